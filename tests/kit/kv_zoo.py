"""Small models that have keys and values in every way that there is, with heads pooled and repeated, or mixes of one another."""

import copy
import inspect
import math
import sys

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.engine.comm import SINGLE_PROCESS
from billhook.kv_heads.layout import HeadTensors, Projections, written
from billhook.kv_heads.moments import gather
from billhook.kv_heads.symmetry import Symmetries, Symmetry
from kit import families

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
BASE = WIDE | {"intermediate_size": 48, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
SEQ2SEQ |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 2, "num_heads": 8, "decoder_start_token_id": 0}
AUDIO = {"max_source_positions": 16, "max_target_positions": 48, "num_mel_bins": 8, "suppress_tokens": None}
IMAGE = {"image_size": 16, "patch_size": 4}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

# class, config, what makes keys and values and how it holds them, KV heads
SEPARATE = ("k_proj", "v_proj")
ZOO: dict[str, tuple[str, dict[str, object], tuple[str, ...], str]] = {
    "llama": ("LlamaForCausalLM", IDS | BASE, SEPARATE, "separate"),
    "phi3": ("Phi3ForCausalLM", IDS | BASE | {"num_key_value_heads": 4}, ("qkv_proj",), "one after the other"),
    "falcon": (
        "FalconForCausalLM",
        IDS | WIDE | {"num_kv_heads": 4, "new_decoder_architecture": True, "bias": True},
        ("query_key_value",),
        "by KV head",
    ),
    "old falcon": ("FalconForCausalLM", IDS | WIDE | {"multi_query": False}, ("query_key_value",), "by head"),
    "alibi falcon": ("FalconForCausalLM", IDS | WIDE | {"multi_query": False, "alibi": True}, ("query_key_value",), "by head"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", IDS | GPT | {"multi_query": False}, ("c_attn",), "by head"),
    "t5": ("T5ForConditionalGeneration", T5, ("k", "v"), "separate"),
    "bart": ("BartForConditionalGeneration", IDS | SEQ2SEQ | {"forced_eos_token_id": None}, SEPARATE, "separate"),
    "pegasus": ("PegasusForConditionalGeneration", IDS | SEQ2SEQ, SEPARATE, "separate"),
    "whisper": ("WhisperForConditionalGeneration", IDS | SEQ2SEQ | AUDIO | {"begin_suppress_tokens": None}, SEPARATE, "separate"),
    "bert": ("BertForMaskedLM", IDS | BASE, ("key", "value"), "separate"),
    "roberta": ("RobertaForMaskedLM", IDS | BASE, ("key", "value"), "separate"),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 8, "hidden_dim": 48, "max_position_embeddings": 64},
        ("k_lin", "v_lin"),
        "separate",
    ),
    "albert": ("AlbertForMaskedLM", IDS | BASE | {"embedding_size": 16}, ("key", "value"), "separate"),
    "vit": ("ViTForImageClassification", BASE | IMAGE, SEPARATE, "separate"),
    "clip": ("CLIPVisionModel", BASE | IMAGE, SEPARATE, "separate"),
    "deberta": ("DebertaForMaskedLM", IDS | BASE | RELATIVE, ("in_proj",), "by head"),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        IDS | BASE | RELATIVE | {"share_att_key": True},
        ("key_proj", "value_proj"),
        "separate",
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        IDS | BASE | {"cls_token_id": 1, "sep_token_id": 2},
        ("Wqkv",),
        "one after the other",
    ),
    "opt": ("OPTForCausalLM", IDS | WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, SEPARATE, "separate"),
    "gpt_neox": ("GPTNeoXForCausalLM", IDS | BASE, ("query_key_value",), "by head"),
    "bloom": ("BloomForCausalLM", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 8}, ("query_key_value",), "by head"),
    "gpt2": ("GPT2LMHeadModel", IDS | GPT, ("c_attn",), "one after the other"),
    "mpt": (
        "MptForCausalLM",
        IDS | {"d_model": 32, "n_layers": 2, "n_heads": 8, "max_seq_len": 64, "expansion_ratio": 2},
        ("Wqkv",),
        "one after the other",
    ),
    "codegen": ("CodeGenForCausalLM", IDS | GPT | {"n_embd": 64, "n_ctx": 64, "rotary_dim": 4}, ("qkv_proj",), "in four"),
    "gptj": ("GPTJForCausalLM", IDS | GPT | {"rotary_dim": 4}, SEPARATE, "separate"),
    "xglm": (
        "XGLMForCausalLM",
        IDS | {"d_model": 32, "num_layers": 2, "attention_heads": 8, "ffn_dim": 48},
        SEPARATE,
        "separate",
    ),
}


def calls_interface(model):
    """Whether the model's code calls transformers' attention interface; in transformers 5.16, fewer families do."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[type(model).__module__])


def moments_of(model, places, groups, runs, comm=SINGLE_PROCESS):
    """The moments of each attention in one number of groups."""
    found = {}
    gather(model, places, groups, runs, lambda _, moments: found.update(moments), comm)
    return found


def build(family: str, **changes: object) -> PreTrainedModel:
    """With random weights, biases and norms too, large enough that every part counts."""
    kind, fields, _, _ = ZOO[family]
    model_class = getattr(tf, kind)
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(model_class.config_class(**fields | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    if model.can_generate():
        model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def is_converted(name: str, model: PreTrainedModel, encoder: bool = False) -> bool:
    """Whether a module stands where heads are converted by default."""
    return encoder or not model.config.is_encoder_decoder or "decoder." in name


def kv_views(weight: torch.Tensor, layout: str, heads: int, kv: int) -> list[torch.Tensor]:
    """Views of the rows of keys and values, outputs first."""
    if layout == "separate":
        return [weight]
    if layout == "one after the other":
        width = len(weight) // (heads + 2 * kv)
        return [weight[heads * width : (heads + kv) * width], weight[(heads + kv) * width :]]
    if layout == "by head":
        rows = weight.view(heads, 3, -1, *weight.shape[1:])
        return [rows[:, 1], rows[:, 2]]
    if layout == "by KV head":
        rows = weight.view(kv, heads // kv + 2, -1, *weight.shape[1:])
        return [rows[:, -2], rows[:, -1]]
    rows = weight.view(4, 3, heads // 4, -1, *weight.shape[1:])  # queries, values, keys
    return [rows[:, 1], rows[:, 2]]


def pooled_and_repeated(dense: PreTrainedModel, family: str, groups: int, encoder: bool = False) -> PreTrainedModel:
    """The dense class: each head of keys and values replaced by the mean of its group."""
    _, fields, names, layout = ZOO[family]
    kv = fields.get("num_kv_heads", fields.get("num_key_value_heads", 8))
    model, found = copy.deepcopy(dense), 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in names or not hasattr(module, "weight") or not is_converted(name, model, encoder):
            continue
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        for own in [weight, *([module.bias.data] if getattr(module, "bias", None) is not None else [])]:
            for view in kv_views(own, layout, 8, kv):
                split = view.reshape(groups, kv // groups, -1)
                view.copy_(split.mean(1, keepdim=True).expand_as(split).reshape(view.shape))
            found += 1
    assert found
    return model


def model_of(family: str, heads: int = 4, queries: int = 1, **changes: object) -> PreTrainedModel:
    """In float64, with weights that make attention sharp: KV heads of width 8 (families of the zoo have 8 of width 4)."""
    torch.manual_seed(0)
    if family in families.EXTRA:
        wide = {"num_attention_heads": heads * queries, "num_key_value_heads": heads, "hidden_size": 8 * heads * queries}
        model = families.build(family, **wide | changes)
    elif family == "phi3":
        model = build(family, **{"num_attention_heads": heads * queries, "num_key_value_heads": heads} | changes)
    elif family == "gpt2":
        model = build(family, **{"n_head": heads} | changes)
    elif family == "bart":
        model = build(family, **{"encoder_attention_heads": heads, "decoder_attention_heads": heads} | changes)
    else:
        model = build(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < parameter.std() < 0.1:
                parameter.mul_(0.2 / parameter.std())
    return model.double()


def draw(freedom: Symmetry, width: int, turn: bool, generator: torch.Generator) -> Tensor:
    """A matrix that mixes what may be mixed; with `turn`, one that keeps lengths."""
    matrix = torch.eye(width, dtype=torch.float64)
    for block in freedom:
        real = torch.tensor(block.real)
        if block.imaginary:
            angle = float(torch.rand(1, generator=generator)) * 2 * math.pi
            size = 1.0 if turn else 0.5 + float(torch.rand(1, generator=generator))
            a, b = size * math.cos(angle), size * math.sin(angle)
            both = torch.tensor([*block.real, *block.imaginary])
            matrix[both[:, None], both] = torch.tensor([[a, -b], [b, a]], dtype=torch.float64)
        else:
            square = torch.randn(len(real), len(real), generator=generator, dtype=torch.float64)
            matrix[real[:, None], real] = torch.linalg.qr(square)[0] if turn else square
    return matrix


def mixed(stacks: HeadTensors, symmetries: Symmetries, groups: int, turn: bool = False) -> HeadTensors:
    """The heads of each group replaced by mixes of its first one; numbers that may not be mixed are the same in all."""
    generator, size = torch.Generator().manual_seed(7), len(stacks.k) // groups
    k, v = (
        torch.stack([draw(free, one.shape[1], turn, generator) @ one[head // size * size] for head in range(len(one))])
        for one, free in ((stacks.k, symmetries.keys), (stacks.v, symmetries.values))
    )
    return HeadTensors(stacks.q, k, v, stacks.o)


@torch.no_grad()
def with_stacks(model: nn.Module, place: Projections, stacks: HeadTensors) -> None:
    """Writes them into the model."""
    for linear, own in written(model, place, stacks).items():
        for name, value in own.items():
            model.get_submodule(linear).get_parameter(name).copy_(value)
