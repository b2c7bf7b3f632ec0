"""Places and levels: what a unit costs is what its removal saves, and what may not be cut stays whole."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.pruning.amount import Amount
from billhook.pruning.target import Search
from billhook.shrinking.levels import Place, called, find_places, gone, removed
from kit import shrinks
from kit.families import T5, build, llama, tokens


def places_of(model, **amount):
    search = Search(model, Amount(**amount))
    return search, find_places(search, search.amount.target)


@pytest.mark.daily("llama-params", "gemma2-kv_cache_bytes")
@pytest.mark.parametrize("target", ["params", "bytes", "kv_cache_bytes"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma2"])
def test_units_cost_what_their_removal_saves(family, target):
    model = build(family)
    search, places = places_of(model, **{target: 0.5})
    assert {place.kind for place in places} == ({"head"} if target == "kv_cache_bytes" else {"head", "channel"})
    flat = {name: torch.arange(own.count("kv_head")) for name, own in search.units.items()}
    flat |= {called(name): torch.arange(own.count()) for name, own in search.units.items()}
    kept = {place.name: place.count - number % 3 for number, place in enumerate(places, 1)}
    numbers = removed(places, search.units, flat, kept)
    plan = bh.pruning.plan_units(model, numbers, ["head", "channel"] if target != "kv_cache_bytes" else "head")
    now, saved = getattr(search.now, target), sum(place.saves(kept[place.name]) for place in places)
    bh.apply(model, plan)
    assert now - saved == getattr(bh.summary(model), target)


def test_levels_are_eighths_and_every_number_of_few():
    def levels(count, allowed):
        return Place(("a",), "channel", count, tuple(allowed), 1).levels()

    assert levels(384, range(384, 0, -1)) == (384, 336, 288, 240, 192, 144, 96, 48)
    assert levels(100, [100, *range(96, 0, -32)]) == (100, 96, 64, 32)
    assert levels(3, range(3, 0, -1)) == (3, 2, 1)
    assert len(levels(32, range(32, 0, -1))) == 8


def test_multiples_and_protected_blocks():
    _, places = places_of(llama(num_hidden_layers=4), params=0.9, first=1, last=1, round_to=32)
    assert {place.name.split(".")[2] for place in places} == {"1", "2"}
    assert {place.allowed for place in places} == {(48, 32), (8, 7, 6, 5, 4, 3, 2, 1)}


def test_the_lowest_scores_go_first_with_their_query_heads():
    search, places = places_of(llama(), params=0.5)
    scores = {name: torch.arange(own.count("kv_head")).flip(0) for name, own in search.units.items()}
    heads = next(place for place in places if place.kind == "head")
    scores |= {called(heads.name): torch.tensor([0, 1] * 4)}
    channels = next(place for place in places if place.kind == "channel")
    numbers = {pair: number for number, pair in enumerate(heads.pairs, 1)}
    assert gone(heads, search.units, scores, numbers[2, 2]) == {heads.name: [4, 5, 6, 7]}
    assert gone(heads, search.units, scores, numbers[4, 1]) == {heads.name: [0, 2, 4, 6]}
    assert gone(heads, search.units, scores, numbers[2, 1]) == {heads.name: [0, 2, 4, 5, 6, 7]}
    assert gone(channels, search.units, scores, 46) == {channels.name: [46, 47]}
    assert gone(heads, search.units, scores, numbers[4, 2]) == {}
    smaller, larger = (gone(channels, search.units, scores, kept)[channels.name] for kept in (30, 12))
    assert set(smaller) < set(larger)


@pytest.mark.nightly
def test_attentions_with_one_position_bias_lose_the_same_heads():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | {"num_layers": 2})).eval()
    search, places = places_of(model, params=0.9)
    together = [place for place in places if len(place.names) > 1]
    assert [len(place.names) for place in together] == [2, 2, 2]  # the encoder, the decoder, and it on the encoder
    scores = {name: torch.rand(own.count("kv_head")) for name, own in search.units.items()}
    numbers = gone(together[0], search.units, scores, 2)
    assert len({tuple(own) for own in numbers.values()}) == 1
    rows = [{"input_ids": tokens(8, 16), "labels": tokens(8, 10)} for _ in range(4)]
    shrunk = shrinks.shrink(model, rows, params=0.9, layers="free", importance=bh.importance.WeightNorm(), generations=0)
    assert shrunk.left == model.num_parameters() <= shrunk.limit


def test_heads_under_a_norm_that_spans_them_stay_whole():
    _, places = places_of(build("olmo2"), params=0.9)
    assert {place.kind for place in places} == {"channel"}
    with pytest.raises(ValueError, match="kv_cache_bytes: no place of this Olmo2ForCausalLM may keep less"):
        places_of(build("olmo2"), kv_cache_bytes=0.5)
