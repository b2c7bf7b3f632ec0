"""Places and levels: what a unit costs is what its removal saves, and what may not be cut stays whole."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.pruning.amount import Amount
from billhook.pruning.target import RatioSearch
from billhook.shrinking.modules import PrunableModule, find_modules, removed_units
from kit import shrinks
from kit.families import T5, build, llama, tokens


def layers_of(model, **amount):
    search = RatioSearch(model, Amount(**amount))
    return search, find_modules(search, search.amount.target)


@pytest.mark.daily("llama-params", "gemma2-bytes")
@pytest.mark.parametrize("target", ["params", "bytes"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma2"])
def test_units_cost_what_their_removal_saves(family, target):
    model = build(family)
    search, layers = layers_of(model, **{target: 0.5})
    assert {layer.kind for layer in layers} == {"head", "channel"}
    flat = {name: torch.arange(own.count("kv_head")) for name, own in search.units.items()}
    kept = {layer.name: layer.count - number % 3 for number, layer in enumerate(layers, 1)}
    numbers = dict[str, list[int]]()
    for layer in layers:
        numbers |= removed_units(layer, search.units, flat, kept[layer.name])
    plan = bh.pruning.plan_units(model, numbers, ["head", "channel"])
    now, saved = getattr(search.now, target), sum(layer.saves(kept[layer.name]) for layer in layers)
    bh.apply(model, plan)
    assert now - saved == getattr(bh.summary(model), target)


def test_configs_are_eighths_and_every_number_of_few():
    def levels(count, allowed):
        return PrunableModule(("a",), "channel", count, tuple(allowed), 1).grid()

    assert levels(384, range(384, 0, -1)) == (384, 336, 288, 240, 192, 144, 96, 48)
    assert levels(100, [100, *range(96, 0, -32)]) == (100, 96, 64, 32)
    assert levels(3, range(3, 0, -1)) == (3, 2, 1)
    assert len(levels(32, range(32, 0, -1))) == 8


def test_multiples_and_protected_blocks():
    _, layers = layers_of(llama(num_hidden_layers=4), params=0.9, first=1, last=1, round_to=32)
    assert {layer.name.split(".")[2] for layer in layers} == {"1", "2"}
    assert {layer.allowed for layer in layers} == {(48, 32), (4, 3, 2, 1)}


def test_the_lowest_scores_go_first_with_their_query_heads():
    search, layers = layers_of(llama(), params=0.5)
    scores = {name: torch.arange(own.count("kv_head")).flip(0) for name, own in search.units.items()}
    heads = next(layer for layer in layers if layer.kind == "head")
    channels = next(layer for layer in layers if layer.kind == "channel")
    assert removed_units(heads, search.units, scores, 2) == {heads.name: [4, 5, 6, 7]}
    assert removed_units(channels, search.units, scores, 46) == {channels.name: [46, 47]}
    assert removed_units(heads, search.units, scores, 4) == {}
    smaller, larger = (removed_units(channels, search.units, scores, kept)[channels.name] for kept in (30, 12))
    assert set(smaller) < set(larger)


@pytest.mark.nightly
def test_attentions_with_one_position_bias_lose_the_same_heads():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | {"num_layers": 2})).eval()
    search, layers = layers_of(model, params=0.9)
    together = [layer for layer in layers if len(layer.names) > 1]
    assert [len(layer.names) for layer in together] == [2, 2, 2]  # the encoder, the decoder, and it on the encoder
    scores = {name: torch.rand(own.count("kv_head")) for name, own in search.units.items()}
    numbers = removed_units(together[0], search.units, scores, 2)
    assert len({tuple(own) for own in numbers.values()}) == 1
    rows = [{"input_ids": tokens(8, 16), "labels": tokens(8, 10)} for _ in range(4)]
    shrunk = shrinks.shrink(model, rows, params=0.9, layers="free", importance=bh.importance.WeightNorm(), generations=0)
    assert shrunk.left == model.num_parameters() <= shrunk.limit


def test_heads_under_a_norm_that_spans_them_stay_whole():
    _, layers = layers_of(build("olmo2"), params=0.9)
    assert {layer.kind for layer in layers} == {"channel"}
    with pytest.raises(ValueError, match="params cannot be met: Olmo2ForCausalLM has no channels or KV heads"):
        layers_of(build("olmo2"), params=0.9, first=1, last=1)
