"""Small configurations of (nearly) every architecture of transformers, and a check that each of them builds and runs."""

import argparse
import collections
import copy
import dataclasses
import re
import signal
import sys
import time
import traceback
import warnings
from types import SimpleNamespace

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from billhook.model.inputs import make_inputs

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB, POSITIONS = 48, 6, 2, 16, 80, 2, 101, 64

# A field's small value by a pattern of its whole name, the first match counts. A callable gets the default value.
RULES = [
    (r".*(hidden|ffn|intermediate)_dropout.*|.*_dropout|.*_prob", lambda old: old),
    (r"qk_head_dim", lambda old: old),
    (r"q_lora_rank|o_lora_rank", lambda old: old and 20),
    (r"kv_lora_rank", 18),
    (r"qk_nope_head_dim", 12),
    (r"qk_rope_head_dim|rotary_dim", lambda old: old and 8),
    (r"v_head_dim", 10),
    (r"(moe|expert)_(intermediate|ffn_hidden)_size|expert_ffn_hidden_size", 28),
    (r"shared_experts?_intermediate_size|moe_shared_expert_intermediate_size", 36),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|d_inner|intermediate_dim|feedforward_dim)"
        r"|dim_feedforward|\w+_linear_units|intermediate_size_mlp|mlp_dim",
        lambda old: old and FFN,
    ),
    (r"hidden_sizes|stage_(mid|out|in)_channels|\w*embed_dims|encoder_hidden_sizes|neck_hidden_sizes", lambda old: shrink(old)),
    (r"(\w+_)?(num_)?((key_value|kv)_heads?|num_kv_heads)", lambda old: KV_HEADS),
    (
        r"(\w+_)?(num_)?(attention|self_attention|cross_attention)_heads|n_heads?|num_heads|\w+_num_heads|encoder_attention_heads"
        r"|decoder_attention_heads",
        lambda old: HEADS if not isinstance(old, tuple) else old,
    ),
    (r"(\w+_)?head_dim|d_kv|d_head|kv_channels|dim_head|attention_head_size", HEAD_DIM),
    (r"mlp_ratio|mlp_ratios", lambda old: old),
    (
        r"hidden_size|d_model|n_embd|emb_dim|dim|(encoder|decoder|text|vision|audio|backbone|language)_(hidden_size|embed_dim|width)"
        r"|embed_dim|embedding_size|embedding_dim|out_hidden_size|projection_dim|word_embed_proj_dim|encoder_hidden_dim|hidden_dim"
        r"|output_hidden_size|attention_hidden_size|projector_hidden_size|output_dim|input_dim|proj_dim|text_embed_dim|lstm_dim"
        r"|width|cross_attention_hidden_size|memory_\w*hidden_size|fpn_hidden_size|decoder_hidden_dim|\w+_embed_dim|d_latents"
        r"|image_text_hidden_size|conv_out_dim",
        lambda old: old and (HIDDEN if not isinstance(old, (tuple, list)) else shrink(old)),
    ),
    (
        r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers|num_(encoder|decoder|attention)_layers)"
        r"|depth|num_hidden_groups|[lxr]_layers|\w+_num_blocks|num_layers_per_stack|\w+_predictor_layers|num_transformer_blocks",
        lambda old: tuple(min(d, LAYERS) for d in old) if isinstance(old, tuple) else old and min(old, LAYERS),
    ),
    (
        r"depths|stage_num_blocks|stage_numb_of_layers|num_block_repeats|block_sizes|layers",
        lambda old: tuple(min(d, LAYERS) for d in old) if isinstance(old, (tuple, list)) else old and min(old, LAYERS),
    ),
    (r"(\w+_)?vocab_size", lambda old: old and VOCAB),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_(source|target|text|encoder|decoder)\w*_positions?|max_seq_len(gth)?"
        r"|max_(encoder|decoder)_position_embeddings|original_max_position_embeddings|max_sequence_length|text_seq_length"
        r"|max_text_len",
        POSITIONS,
    ),
    (r"max_source_positions", 20),
    (r"num_mel_bins|num_mel_filters|input_feat_per_channel|feature_projection_input_dim|input_feat_size", 16),
    (r"vocab_size_per_layer_input", VOCAB),
    (r"hidden_size_global", HIDDEN),
    (r"hidden_size_per_layer_input", 8),
    (r"index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"index_topk", 4),
    (r"sliding_window(_size)?|attention_chunk_size", lambda old: old and 4),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num|num_moe_experts", lambda old: 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_?k|moe_k|top_k_experts|num_experts_per_token", lambda old: min(old or 2, 2)),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"linear_conv_kernel_dim|conv_kernel_size|conv_kernel", lambda old: shrink_conv(old)),
    (r"conv_dim", lambda old: (16, 16) if isinstance(old, (tuple, list)) else HIDDEN),
    (r"conv_stride", lambda old: (2, 2) if isinstance(old, (tuple, list)) else old),
    (r"num_feat_extract_layers", 2),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups|positional_embedding_groups", 4),
    (r"tdnn_dim", (16, 16, 16, 16, 16)),
    (r"(\w+_)?image_size|img_size", lambda old: (32, 32) if isinstance(old, (tuple, list)) else old and 32),
    (r"patch_size", lambda old: tuple(min(p, 8) for p in old) if isinstance(old, (tuple, list)) else min(old or 8, 8)),
    (r"state_size|mamba_d_state|ssm_state_size|d_state", 4),
    (r"chunk_size|mamba_chunk_size", 4),
    (r"time_step_rank|mamba_dt_rank", 5),
    (r"(\w+_)?codevector_dim|proj_codevector_dim|classifier_proj_size|xvector_output_dim", 16),
    (r"num_codevectors_per_group", 10),
    (r"num_queries", 7),
]
RULES = [(re.compile(pattern), value) for pattern, value in RULES]

# What the rules get wrong, by model type.
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_expand": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
SWIN = {"patch_size": 2, "window_size": 2, "embed_dim": 24, "image_size": 32}
OVERRIDES = {
    "codegen": {"n_head": 8, "n_embd": 64, "rotary_dim": 4},  # the heads are dealt to four cores
    "squeezebert": {"num_attention_heads": 4},  # of each group of its convolutions, a whole number of heads
    "deepseek_v4": {"o_groups": 2},
    "wavlm": {"num_conv_pos_embedding_groups": 6},
    "bamba": MAMBA2,
    "granitemoehybrid": MAMBA2
    | {"num_local_experts": 4, "shared_intermediate_size": 36, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 96},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "num_key_value_heads": HEADS},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 6,
        "mamba_ngroups": 2,
        "adapter_rank": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_hidden_layers": 3,
        "num_key_value_heads": HEADS,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 18,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 10,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "head_dim": 20,
    },
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": HEADS},  # with fewer keys than values, eager attention fails
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "xlnet": {"d_head": None},
    "xmod": {"default_language": "en_XX"},
    "esmc": {"num_key_value_heads": HEADS, "head_dim": 8},
    "esm": {"pad_token_id": 1, "mask_token_id": 32, "vocab_size": 33},
    "mobilebert": {"embedding_size": 48, "intra_bottleneck_size": 24, "true_hidden_size": 24},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 32),
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "feed_forward_size": FFN,
    },
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64},
    "longformer": {"attention_window": 4},
    "gemma3n_text": {
        "laurel_rank": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "maskformer-swin": SWIN,
    "cvt": {"depth": (1, 2, 3), "embed_dim": (16, 24, 48), "num_heads": (1, 3, 6)},
    "levit": {
        "patch_size": 16,
        "image_size": 64,
        "hidden_sizes": (32, 48, 64),
        "num_attention_heads": (2, 3, 4),
        "key_dim": (8, 8, 8),
    },
    "bit": {"num_groups": 4, "embedding_size": 16},
    "textnet": {"stem_out_channels": 16, "hidden_sizes": (16, 16, 32, 48, 64)},
    "efficientnet": {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.5},
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 32, 64, 96),
        "stage_mid_channels": (8, 16, 24, 32),
        "stage_out_channels": (32, 64, 96, 128),
        "stage_num_blocks": (1, 1, 2, 1),
        "stage_numb_of_layers": (2, 2, 2, 2),
        "hidden_sizes": (32, 64, 96, 128),
        "depths": (1, 1, 2, 1),
    },
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "hidden_sizes": (24, 32, 48),
        "neck_hidden_sizes": (8, 16, 24, 32, 48, 64, 80),
        "num_attention_heads": 4,
    },
    "granite_speech5_encoder": {"context_size": 16, "head_dim": 8},
    "mimo_v2_flash": {"num_attention_heads": 8},
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "moonshine_streaming": {"num_key_value_heads": HEADS, "head_dim": 8},
    "moonshine_streaming_encoder": {"sliding_windows": ((16, 4), (16, 0)), "head_dim": 8},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "voxtral_encoder": {"intermediate_size": 4 * HIDDEN, "head_dim": 8},
    "qwen3_moe": {"head_dim": HEAD_DIM},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4], "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_out_dim": HIDDEN},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": KV_HEADS, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": FFN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "bros": {"hidden_size": 64, "num_attention_heads": 4},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE | {"head_dim": 16},
    "glm_image_text": MROPE,
    "glm_ocr_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "hy_v4_vl_text": MROPE,
    "cosmos3_edge_text": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
    "hunyuan_vl_text": {"rope_parameters": ROPE | {"xdrope_section": [2, 2, 2, 2]}},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2, "hidden_size": 16, "depths": (1,) * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "hidden_size": 16, "depths": (1,) * 7},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2, "hidden_size": 16, "depths": (1,) * 7},
    "vibevoice_semantic_tokenizer": {"num_filters": 2, "hidden_size": 16, "depths": (1,) * 7},
    "autoformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "informer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2]},
    "siglip2_vision_model": {"num_patches": 16},
    "deformable_detr": {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [28, 28]},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8, "input_size": 32, "patch_size": 8},
    "lightglue": {"descriptor_dim": 48},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "mimi": {
        "num_filters": 8,
        "upsample_groups": HIDDEN,
        "vector_quantization_hidden_dimension": 24,
        "codebook_dim": 24,
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
}


def shrink(value):
    """A list of channel counts, smaller by one common factor."""
    if not isinstance(value, (tuple, list)):
        return value and HIDDEN
    factor = 8 if max(value) > 512 else 4
    return type(value)(max(v // factor, 1) for v in value)


def shrink_conv(value):
    """The kernels of two convolutions where there is a list."""
    return (3, 3) if isinstance(value, (tuple, list)) else value


def small_value(name, default):
    """The small value of one field, or the default."""
    if isinstance(default, (bool, str, float, dict)):
        return default
    if re.fullmatch(r".*token_(id|index)|\w+_start_id|\w+_end_id", name) and isinstance(default, int) and default >= VOCAB:
        return 10 + sum(map(ord, name)) % (VOCAB - 11)  # spread, the same in each run
    if name in ("patch_size", "window_size", "image_size") and isinstance(default, int) and default <= 4:
        return default
    for pattern, value in RULES:
        if pattern.fullmatch(name):
            return value(default) if callable(value) else value
    return default


def parts_of(config_class):
    """The fields of a config that are configs, and what each is by default; of older releases the class alone is known."""
    if hasattr(config_class, "sub_configs_defaults"):
        return config_class.sub_configs_defaults
    kinds = {name: kind for name, kind in config_class.sub_configs.items() if issubclass(kind, transformers.PreTrainedConfig)}
    return {n: SimpleNamespace(config_class=kind, optional=False, init_kwargs={}, model_type=None) for n, kind in kinds.items()}


def small_config(config_class, **overrides):
    """A small configuration of any class of transformers."""
    values = {}
    names = set()
    for field in dataclasses.fields(config_class):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        names.add(field.name)
        if field.name in BASE or field.name in parts_of(config_class) or default is dataclasses.MISSING:
            continue
        value = small_value(field.name, default)
        if value is not default and value != default:
            values[field.name] = value
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = HEADS
    for name, spec in parts_of(config_class).items():
        if spec.optional:
            continue
        sub_class = spec.config_class
        if not issubclass(sub_class, transformers.PreTrainedConfig):
            sub_class = CONFIG_MAPPING[spec.model_type]
        given = {k: small_value(k, v) for k, v in spec.init_kwargs.items() if k not in NOT_SMALL}
        values[name] = small_config(sub_class, **given)
    values |= copy.deepcopy(OVERRIDES.get(config_class.model_type, {}))
    values |= overrides
    if "layer_types" in names and "layer_types" not in values:
        values |= small_layer_types(config_class, values)
    config = config_class(**values)
    rope = copy.deepcopy(getattr(config, "rope_parameters", None) or {})
    if rope:
        config.rope_parameters = rope
    for section in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if section.get("mrope_section"):
            shrink_mrope(config, section)
    return config


NOT_SMALL = {"model_type", "per_layer_config", "layer_types"}
BASE = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}


def small_layer_types(config_class, values):
    """`layer_types` with each kind of the default configuration once, at least two layers."""
    full = {k: v for k, v in values.items() if k not in ("num_hidden_layers", "n_layer", "num_layers")}
    try:
        types = config_class(**full).layer_types
    except Exception:  # the class then computes them from the small number of layers
        return {}
    if not types:
        return {}
    kinds = list(dict.fromkeys(types))
    kinds += kinds[-1:] * (LAYERS - len(kinds))
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


def shrink_mrope(config, section):
    """The sections of a multimodal rope must sum to half the rotated size of a head."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * section.get("partial_rotary_factor", 1.0)) // 2
    old = section["mrope_section"]
    new = [max(rotated * s // sum(old), 1) for s in old]
    new[0] += rotated - sum(new)
    section["mrope_section"] = new


AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}


def names():
    """Yield (auto class name, model type), `AutoModel` only for what no other list has; nothing is imported for it."""
    seen = set()
    for auto, mapping in AUTO_CLASSES.items():
        for model_type in getattr(modeling_auto, f"{mapping}_NAMES"):
            if auto != "AutoModel" or model_type not in seen:
                yield auto, model_type
            seen.add(model_type)


def architectures(name=None):
    """Yield (auto class name, model type, config class, model class), as `names` lists them.

    With the name of a model type or a class only those, and no code of others is imported.
    """
    for auto, model_type in names():
        mapping = AUTO_CLASSES[auto]
        classes = getattr(modeling_auto, f"{mapping}_NAMES")[model_type]
        if name not in (None, model_type, classes if isinstance(classes, str) else classes[0]):
            continue
        config_class = CONFIG_MAPPING[model_type]
        try:
            model_class = getattr(modeling_auto, mapping)[config_class]
        except ValueError:  # transformers 5.24 lists a few classes that it does not have
            print(f"{auto} {model_type}: not in this transformers", file=sys.stderr)
            continue
        yield auto, model_type, config_class, model_class[0] if isinstance(model_class, tuple) else model_class


def build(config, model_class, experts="eager"):
    """The model of a small configuration with seeded random weights, in eval mode."""
    if not isinstance(config, model_class.config_class):  # a text model of a composite configuration, as the auto classes do
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    if model_class.__name__.endswith(("ForCausalLM", "LMHeadModel", "ModelWithLMHead")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    config._experts_implementation = experts
    torch.manual_seed(0)
    return model_class(config).eval()


def has_experts(config):
    """Whether any part of the configuration counts experts."""
    return any("expert" in name for name in config.to_dict()) or any(
        has_experts(sub) for name in parts_of(type(config)) if (sub := getattr(config, name)) is not None
    )


def place_of(error):
    """The last frame inside transformers of an error's traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/transformers/" in f.filename]
    if not frames:
        frames = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{frames[-1].filename.split('transformers/')[-1]}:{frames[-1].lineno}"


def check(model_type, config_class, model_class):
    """Build and run one architecture: "ok", or the step that failed with its error."""
    step = "config"
    try:
        config = small_config(config_class)
        step = "size"
        with torch.device("meta"):
            size = sum(p.numel() for p in build(small_config(config_class), model_class).parameters()) * 4 / 1e6
        if size > 100:
            return f"size: {size:.0f} MB"
        for experts in ["eager", "batched_mm"] if has_experts(config) else ["eager"]:
            step = "build" if experts == "eager" else f"build {experts}"
            model = build(small_config(config_class), model_class, experts)
            step = step.replace("build", "inputs")
            inputs = make_inputs(model)
            step = step.replace("inputs", "forward")
            with torch.no_grad():
                model(**inputs)
    except Exception as error:
        first = " ".join(str(error).split())[:150].replace("Class validation error for validator ", "")
        return f"{step}: {type(error).__name__}: {first} ({place_of(error)})"
    return "ok"


class Slow(Exception):
    """An architecture took longer than the alarm."""


def main():
    """Check all architectures, or those whose model type is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, all by default")
    parser.add_argument("--auto", help="one auto class only")
    parser.add_argument("--failures", action="store_true", help="print only what fails")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    def ring(*_):
        raise Slow("longer than 20 s")

    signal.signal(signal.SIGALRM, ring)
    summary = collections.defaultdict(collections.Counter)
    for auto, model_type, config_class, model_class in architectures():
        if (args.names and model_type not in args.names) or (args.auto and auto != args.auto):
            continue
        signal.alarm(20)
        start = time.perf_counter()
        result = check(model_type, config_class, model_class)
        signal.alarm(0)
        took = time.perf_counter() - start
        summary[auto][result.split(":")[0]] += 1
        if result != "ok" or not args.failures:
            print(f"{auto:32} {model_type:32} {took:5.2f}s {result}", flush=True)
    for auto, counts in summary.items():
        print(f"{auto}: {counts['ok']} of {sum(counts.values())} ok, {dict(counts)}")


if __name__ == "__main__":
    sys.exit(main())
