import copy
import logging
import math
import struct
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedModel

import billhook
from billhook.report.plot import plot
from billhook.report.summary import Stage, summary, table

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
HISTORY = [(0, 39.3), (20, 42.5), (40, 114), (60, 91), (80, 74), (100, 62), (240, 46.9)]
EVENT = (20, "8 -> 1 KV heads (mean)", 42.5, 1139.0)


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
    assert (vit.kv_cache_bytes, vit.flops, vit.query_heads) == (None, None, 4)
    assert str(vit).count("unknown") == 2


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
        Stage("after uptraining", 240, {"val_perplexity": math.inf, "params": 900_000, "kv_cache_bytes": None}),
    ]
    lines = table(stages, [("plot", "a.png"), ("checkpoint", "b")]).splitlines()
    assert lines[0].split() == ["step", "perplexity", "parameters", "KV-cache", "bytes/token"]
    assert lines[2].split() == ["dense", "20", "42.50", "1,000,000", "4,096"]
    assert lines[3].split()[-3:] == ["1,139", "900,000", "512"]
    assert lines[4].split()[-3:] == ["inf", "900,000", "-"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[-2:] == ["plot        a.png", "checkpoint  b"]


def test_table_without_validation():
    assert table([Stage("at the end", 3, {})]).splitlines()[0].split() == ["step"]
    assert table([]).splitlines()[0].split() == ["step"]
    assert "loss" in table([Stage("at the end", 3, {"val_loss": math.nan})])


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


CASES = {
    "one event": (HISTORY, [EVENT]),
    "three events": (HISTORY, [EVENT, (100, "4 -> 2 KV heads (mean)", 62, 300), (240, "2 -> 1 KV heads (mean)", 46.9, 800)]),
    "near steps": (HISTORY, [(step, f"{step} KV heads", 40.0 + step, 90.0) for step in (20, 21, 22, 23)]),
    "one step": (HISTORY, [EVENT, EVENT]),
    "one point": ([(5, 1.0)], []),
    "nothing": ([], []),
    "no figures": ([], [(5, "8 -> 1 KV heads (mean)", None, None)]),
    "only before": (HISTORY, [(20, "8 -> 1 KV heads (mean)", 42.5, None)]),
    "not finite": (
        [(0, 40.0), (10, math.inf), (20, math.nan), (30, 50.0)],
        [(10, "a", 41.0, math.inf), (20, "b", math.nan, 1e9)],
    ),
    "never finite": ([(0, math.nan), (1, math.inf)], [(1, "a", math.inf, -math.inf)]),
    "negative": ([(0, -1.0), (1, 0.0), (2, 5.0)], []),
    "huge": ([(0, 1.0), (1, 1e300)], [(1, "a name that is far too long for any picture " * 5, 1.0, 1e300)]),
    "$names$": ([(0, 1.0)], [(0, "100 % of $x_1 _ \\frac$", 1.0, 2.0)]),
}


@pytest.mark.parametrize("case", CASES)
def test_plot_draws_whatever_a_run_gives(case, tmp_path):
    history, events = CASES[case]
    before = copy.deepcopy(CASES[case])
    plot(history, events, "val_perplexity", tmp_path / "a.png", history[0][1] if history else None)
    assert png_size(tmp_path / "a.png") == (1200, 675)
    assert before == CASES[case]


def drawn(monkeypatch, *arguments):
    import matplotlib.figure

    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, _: figures.append(self))
    plot(*arguments)
    figure = figures[0]
    figure.draw_without_rendering()
    return figure.axes[0]


def test_plot_says_the_values_in_plain_numbers(monkeypatch):
    axes = drawn(monkeypatch, HISTORY, [EVENT], "val_perplexity", "a.png", 39.3)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "validation perplexity"
    assert {"50", "100", "1,000"} <= {tick.get_text() for tick in axes.get_yticklabels()}
    assert {text.get_text().strip() for text in axes.texts} == {"39.3", "42.5", "1,139", "46.9", "dense", EVENT[1]}
    assert any(list(line.get_ydata()) == [39.3, 39.3] for line in axes.lines)
    assert drawn(monkeypatch, [(0, 0.9), (1, 0.1)], [], "val_accuracy", "a.png").get_yscale() == "linear"


def test_plot_labels_do_not_lie_on_each_other_or_on_the_curve(monkeypatch):
    events = [(20, "8 -> 4 KV heads (mean)", 42.5, 130), (30, "4 -> 2 KV heads (mean)", 60, 310), EVENT[:1] + EVENT[1:]]
    axes = drawn(monkeypatch, HISTORY, [*events[:2], (180, "2 -> 1 KV heads (mean)", 52, 800)], "val_perplexity", "a.png")
    extents = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    names = [text.get_window_extent() for text in axes.texts if "KV" in text.get_text()]
    assert len(names) == 3
    assert all(extent.y0 > axes.bbox.y1 for extent in names)
    assert all(axes.figure.bbox.x0 <= extent.x0 <= extent.x1 <= axes.figure.bbox.x1 for extent in extents)


def test_plot_labels_stand_beside_their_own_points(monkeypatch):
    """Two of almost one value, one just after the other."""
    history = [(0, 38.3), (20, 228), (100, 58), (300, 42.6)]
    axes = drawn(monkeypatch, history, [(10, "8 -> 1 KV heads (mean)", 38.8, 1270)], "val_perplexity", "a.png")
    dots = {"38.3": (0, 38.3), "38.8": (10, 38.8), "1,270": (10, 1270), "42.6": (300, 42.6)}
    places = {name: axes.transData.transform(dot) for name, dot in dots.items()}
    for text in axes.texts:
        if (name := text.get_text()) in dots:
            extent = text.get_window_extent()
            center = ((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)
            assert min(places, key=lambda other: math.dist(places[other], center)) == name
    assert {text.get_text() for text in axes.texts} >= dots.keys()


def test_plot_touches_no_global_state(tmp_path):
    import sys

    import matplotlib

    settings, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plot(HISTORY, [EVENT], "val_perplexity", tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_heads_of_a_model_whose_config_cannot_say_them():
    model = llama()
    billhook.prune_units(model, {0: [1], 1: [2], 2: [3]})  # three heads do not divide 16
    assert (summary(model).query_heads, summary(model).kv_heads) == (3, 3)
    billhook.prune_units(model, {0: [0]})
    assert (summary(model).query_heads, summary(model).kv_heads) == (None, None)
