import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedModel

import billhook
import billhook as bh
from billhook.adapters.lora import attach
from billhook.report.summary import Stage, stage_table, summary

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}


def llama(**fields) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 64} | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_kv_cache_is_keys_and_values_of_every_layer(heads, dtype):
    model = llama(head_dim=6).to(dtype)
    layers, head_dim = 3, 6
    if heads < 4:
        billhook.convert_kv_heads(model, heads)
    assert summary(model).kv_cache_bytes == 2 * layers * heads * head_dim * dtype.itemsize
    assert (summary(model).query_heads, summary(model).kv_heads) == (4, heads)


@pytest.mark.parametrize("window", [3, 300])
def test_a_cache_of_a_window_counts_as_if_it_was_not_yet_full(window):
    text = SIZES | {"max_position_embeddings": 512, "head_dim": 6, "num_key_value_heads": 2}
    text["sliding_window"] = window
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**text, layer_types=kinds))
    assert summary(model).kv_cache_bytes == 2 * 3 * 2 * 6 * 4
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**text))
    assert summary(mistral).kv_cache_bytes == 2 * 3 * 2 * 6 * 4


def test_states_that_do_not_grow_are_no_cache_of_tokens():
    kinds = ["conv", "full_attention", "conv"]
    config = transformers.Lfm2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64, layer_types=kinds)
    assert summary(transformers.Lfm2ForCausalLM(config)).kv_cache_bytes == 2 * 2 * 4 * 4


def test_other_families():
    text = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**text, n_embd=16, n_layer=3, n_head=4, n_positions=64))
    assert summary(gpt2).kv_cache_bytes == 2 * 3 * 4 * 4 * 4
    assert (summary(gpt2).context, summary(gpt2).kv_heads) == (64, 4)
    bert = summary(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=64)))
    assert bert.kv_cache_bytes is None
    assert bert.flops > 0
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=4, decoder_start_token_id=0
    )
    t5 = summary(transformers.T5ForConditionalGeneration(config))
    assert t5.kv_cache_bytes == 2 * 3 * 4 * 4 * 4  # what the decoder keeps of its own tokens
    assert t5.context == 512
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    vit = summary(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)))
    assert (vit.kv_cache_bytes, vit.query_heads) == (None, 4)
    assert str(vit).count("unknown") == 1


@pytest.mark.parametrize("kind", ["Bart", "MBart", "Pegasus"])
def test_a_decoder_that_asks_its_mask_for_values_has_a_cache(kind):
    """As a run counts it; T5's does not ask."""
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        d_model=16, vocab_size=64, encoder_layers=1, decoder_layers=3, max_position_embeddings=32, **sizes
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    ids = torch.arange(3, 8)[None]
    cached = [model(input_ids=ids, decoder_input_ids=ids[:, :n], use_cache=True).past_key_values for n in (1, 2)]
    held = [sum(one.keys.nbytes + one.values.nbytes for one in cache.self_attention_cache.layers) for cache in cached]
    assert summary(model).kv_cache_bytes == held[1] - held[0] > 0
    assert summary(model).flops


def test_heads_that_differ_between_layers():
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    assert " 4 / 2\n" in str(summary(model))
    bh.pruning.prune_units(model, {0: [0, 2]})
    found = summary(model)
    assert (found.query_heads, found.kv_heads, found.heads) == (None, None, ((2, 2), *[(4, 2)] * (len(found.heads) - 1)))
    assert "  2 to 4 / 2\n" in str(found)
    assert f"{found.kv_cache_bytes:,} bytes in float32\n" in str(found)


def test_a_config_whose_padding_may_not_be_none():
    config = transformers.ModernBertDecoderConfig(**SIZES, pad_token_id=0, layer_types=["full_attention"] * 3)
    with pytest.raises(StrictDataclassFieldValidationError, match="pad_token_id"):
        config.pad_token_id = None
    model = transformers.ModernBertDecoderForCausalLM(config)
    assert summary(model).kv_cache_bytes == 2 * 3 * 4 * 4 * 4
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize("heads", [4, 1])
def test_flops_by_hand(heads):
    tokens, hidden, inner, layers, vocab = 64, 16, 32, 3, 50
    width = hidden // 4 * heads
    linear = layers * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * inner) + hidden * vocab
    attention = layers * 2 * tokens * hidden  # each query meets every key, and weighs every value
    assert summary(llama(num_key_value_heads=heads)).flops == 2 * (linear + attention)
    assert summary(llama(num_key_value_heads=heads)).context == tokens


def test_flops_of_an_image_by_hand():
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    patches, tokens, hidden, inner, layers = 4, 5, 16, 32, 3
    linear = patches * 3 * 8 * 8 * hidden + layers * tokens * (4 * hidden * hidden + 2 * hidden * inner) + hidden * 3
    attention = layers * 2 * tokens * tokens * hidden
    assert (summary(vit).flops, summary(vit).context) == (2 * (linear + attention), 0)
    assert f"forward FLOPs per image  {summary(vit).flops:,}" in str(summary(vit))


def test_parameters_zeros_and_bytes():
    free, tied = llama(), llama(tie_word_embeddings=True)
    assert summary(free).params - summary(tied).params == 50 * 16
    assert summary(tied).params == sum(p.numel() for p in tied.parameters())
    assert summary(tied).bytes == 4 * summary(tied).params
    with torch.no_grad():
        tied.lm_head.weight[:10] = 0
    assert summary(tied).zeros == summary(tied.half()).zeros == 10 * 16
    assert summary(tied).bytes == 2 * summary(tied).params
    text = str(summary(tied))
    assert f"{summary(tied).params:,}" in text
    assert "4 / 4" in text
    assert summary(tied).numbers().keys() == {"params", "zeros", "kv_cache_bytes", "flops"}
    assert summary(tied).to_dict()["model"] == "LlamaForCausalLM"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_nothing_warns(training, caplog, monkeypatch):
    model = llama(tie_word_embeddings=True).train(training)
    model.model.norm.train(not training)
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    model.get_parameter("model.norm.weight").grad = gradient = torch.ones(16)
    config, random = copy.deepcopy(model.config), torch.get_rng_state()
    tensors = {name: (id(p), p.clone(), p._version) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.utils.logging.warning_once.cache_clear()
    billhook.summary(model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not called
    assert len(model._forward_hooks) == 1
    assert model.get_parameter("model.norm.weight").grad is gradient
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        identity, values, version = tensors[name]
        assert (id(parameter), parameter._version) == (identity, version)
        assert torch.equal(parameter, values)


def test_hooks_that_cannot_be_copied_do_not_hide_the_cache():
    model = llama()
    lock = open(__file__)  # noqa: SIM115
    model.model.layers[0].register_forward_pre_hook(lambda *_, held=lock: None)
    model.model.layers[0].mlp.register_forward_hook(Unfit(lock).hook)
    assert summary(model).kv_cache_bytes == 2 * 3 * 4 * 4 * 4
    lock.close()


class Unfit:
    def __init__(self, held):
        self.held = held

    def hook(self, *_):
        raise AssertionError("called")


def test_table_says_what_is_known():
    stages = [
        Stage("dense", 20, {"val_perplexity": 42.5, "val_loss": 3.7, "params": 1_000_000, "kv_cache_bytes": 4096}),
        Stage("after 8 -> 1 KV heads (mean)", 20, {"val_perplexity": 1139.4, "params": 900_000, "kv_cache_bytes": 512}),
        Stage("after training", 240, {"val_perplexity": math.inf, "params": 900_000, "kv_cache_bytes": None}),
    ]
    lines = stage_table(stages, [("plot", "a.png"), ("checkpoint", "b")]).splitlines()
    assert lines[0].split() == ["step", "perplexity", "parameters", "KV-cache", "bytes/token"]
    assert lines[2].split() == ["dense", "20", "42.50", "1,000,000", "4,096"]
    assert lines[3].split()[-3:] == ["1,139", "900,000", "512"]
    assert lines[4].split()[-3:] == ["inf", "900,000", "-"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[-2:] == ["plot        a.png", "checkpoint  b"]
    assert stage_table(stages, dtype="float16").splitlines()[0].endswith("  KV-cache bytes/token in float16")


def test_adapters_are_not_the_models_parameters_or_zeros():
    model = llama(num_key_value_heads=2)
    dense = summary(model)
    attach(model, billhook.training.LoRA(r=2))
    adapted = summary(model)
    assert adapted.adapters == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) > 0
    assert replace(adapted, adapters=0) == dense
    said = [line.rsplit("  ", 1)[1] for line in str(adapted).splitlines()[1:3]]
    assert [text.strip() for text in said] == [f"{dense.params:,}", f"{adapted.adapters:,}"]
    billhook.training.merge(model)
    assert summary(model) == dense
