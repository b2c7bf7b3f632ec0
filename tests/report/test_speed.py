"""Models side by side: what is measured in which order, and bytes, operations and ratios against formulas of their own."""

from statistics import median

import pytest
import torch
import transformers

from billhook.report import speed
from billhook.report.speed import Timing, measure_speed, spread
from kit.families import build, llama

CELLS = {"batch_sizes": [1, 3], "contexts": [8, 16], "new_tokens": 3, "rounds": 2}


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("kind", ["static", "reserved", "dynamic"])
def test_a_row_for_each_cell_phase_and_model_and_a_cache_smaller_by_the_head_ratio(kind):
    models = [llama(num_key_value_heads=heads, num_hidden_layers=1) for heads in (8, 2, 1)]
    rows = measure_speed(models, **CELLS, cache=kind)
    found = [(row.batch_size, row.context, row.phase, row.model) for row in rows]
    assert found == [(b, c, p, m) for b in (1, 3) for c in (8, 16) for p in ("prefill", "decode") for m in range(3)]
    for row in rows:
        assert len(row.seconds) == len(row.ratios) == 2
        assert min(row.seconds) > 0
        dense, heads = rows[found.index((*found[rows.index(row)][:3], 0))], (8, 2, 1)[row.model]
        assert dense.cache_bytes == row.cache_bytes * 8 // heads
        assert row.cache_bytes_per_token == 2 * heads * 4 * 4  # keys and values, heads, their width, float32
        assert row.ratios == tuple(a / b for a, b in zip(dense.seconds, row.seconds, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_that_a_step_moves_and_the_ideal(tied):
    models = [llama(num_key_value_heads=heads, tie_word_embeddings=tied) for heads in (8, 2)]
    rows = measure_speed(models, [3], [16], 4, 1, 0, phases=["decode"])
    table = 64 * 32 * 4
    weights = [4 * sum(p.numel() for p in one.parameters()) - (0 if tied else table) for one in models]
    moved = [own + 3 * 20 * 2 * 2 * heads * 4 * 4 for own, heads in zip(weights, (8, 2), strict=True)]
    assert [row.weight_bytes for row in rows] == weights
    assert [row.ideal for row in rows] == [1, moved[0] / moved[1]]
    assert rows[1].rate == moved[1] / rows[1].seconds[0]
    assert rows[1].share == pytest.approx(rows[1].ratios[0] * moved[1] / moved[0])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_operations_of_the_prefill(family):
    models = [build(family, num_key_value_heads=heads) for heads in (8, 2)]
    rows = measure_speed(models, [3], [16], 1, 1, 0, phases=["prefill"])
    n, layers, hidden, width = 16, 2, 32, 8 * models[0].model.layers[0].self_attn.head_dim
    for row, heads in zip(rows, (8, 2), strict=True):
        linears = hidden * (2 * width + 2 * width * heads // 8)
        linears += (
            3 * hidden * 48 if family == "llama" else 2 * 3 * hidden * 16 + hidden * 4
        )  # two experts a token, and the router
        expected = 2 * (layers * (n * linears + 2 * n * n * width) + hidden * 64)  # the logits of one token
        assert row.flops == 3 * expected
        assert row.tokens_per_second == 3 * 16 / row.seconds[0]
    assert rows[1].ideal == rows[0].flops / rows[1].flops


def test_models_stay_as_they_are():
    model = llama()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    measure_speed([model], [2], [8], 2, 1, 0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert torch.is_grad_enabled()


def test_a_model_that_predicts_no_next_token_has_a_prefill_only():
    rows = measure_speed([bert(), bert()], [2], [8], 2, 1, 0)
    assert [(row.phase, row.model, row.cache_bytes) for row in rows] == [("prefill", 0, 0), ("prefill", 1, 0)]
    assert rows[1].ideal == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, r"models=\[\] must have at least one"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes=0 must be a whole number of at least 1"),
        ({"contexts": []}, r"contexts=\[\] must have at least one entry"),
        ({"new_tokens": 0}, r"new_tokens=0 must"),
        ({"rounds": 0}, r"rounds=0 must"),
        ({"warmup": -1}, r"warmup=-1 must be a whole number of at least 0"),
        ({"cache": "paged"}, "static, reserved, dynamic"),
        ({"phases": ["train"]}, "prefill, decode"),
        ({"contexts": [64]}, "LlamaForCausalLM .number 0. supports 64. Use fewer"),
        ({"models": "training"}, "training mode"),
        ({"models": "t5"}, "is an encoder-decoder"),
        ({"models": "gpt1"}, "OpenAIGPTLMHeadModel .* does not support transformers. caches"),
        ({"models": "bert", "phases": ["decode"]}, "predict next tokens"),
    ],
)
def test_refusals_come_before_anything_is_run(changes, said, monkeypatch):
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    gpt1 = transformers.OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=4, n_positions=64)
    special = {
        "training": lambda: llama().train(),
        "bert": bert,
        "t5": lambda: transformers.T5ForConditionalGeneration(t5).eval(),
        "gpt1": lambda: transformers.OpenAIGPTLMHeadModel(gpt1).eval(),
    }
    models = changes.get("models", "plain")
    models = [special.get(models, llama)()] if isinstance(models, str) else models
    monkeypatch.setattr(speed, "Generation", None)
    with pytest.raises(ValueError, match=said):
        measure_speed(**CELLS | changes | {"models": models})


def test_medians_and_quartiles():
    row = Timing(1, "decode", 4, 100, (4.0, 1.0, 2.0, 3.0, 9.0), (1.0, 3.0, 2.0, 5.0, 4.0), 10, 20, 110, None, 6.0, None)
    assert (row.median, row.speed_up, row.share, row.tokens_per_second) == (3.0, 3.0, 0.5, 4 / 3)
    assert row.rate == 10
    assert spread(row.seconds) == (2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0)
    assert median(row.to_dict()["ratios"]) == row.to_dict()["speed_up"]
