"""Query heads within the same budget: what they save, which go, chosen where that loses nothing, saved, and found again."""

import copy

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.batches import Batch
from billhook.model.config_fields import build_on_meta
from billhook.pruning.amount import Amount
from billhook.pruning.target import Search
from billhook.shrinking import levels, variants
from billhook.shrinking.damages import damages, make_slots
from billhook.shrinking.divergence import divided
from billhook.shrinking.levels import any_gone, called, find_places, gone, pairs_of
from billhook.shrinking.work import Work
from kit import shrinks
from kit.families import build, llama, tokens

FEW = {"generations": 1, "candidates": 2}
GROUPED = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
IDLE = ([0, 3], [1, 5], [2, 4])
"""By layer, query heads that nothing reads, one of each KV head."""


def texts(rows=6, length=20):
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(rows, length)}, name) for name in ("one", "two") * 3]


def idle(family="llama", **changes):
    """A model whose predictions suffer when it is cut, and a third of whose query heads do nothing."""
    torch.manual_seed(1)
    model = build(family, **{"num_hidden_layers": 3, **GROUPED} | changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for layer, heads in zip(model.model.layers, IDLE, strict=True):
            layer.mlp.down_proj.weight.mul_(4)
            layer.self_attn.o_proj.weight.mul_(4)
            for head in heads:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    return model


def size_with(model, heads):
    config = copy.deepcopy(model.config)
    config.num_attention_heads = heads
    return build_on_meta(model, config).num_parameters()


def places_of(model, **amount):
    search = Search(model, Amount(**amount))
    places = find_places(search, search.amount.target)
    return search, places, [place for place in places if place.kind == "head"]


def number_of(place, pair):
    return place.pairs.index(pair) + 1


@pytest.mark.daily("params-uniform")
@pytest.mark.parametrize("layers", ["uniform", "free"])
@pytest.mark.parametrize("target", ["params", "bytes"])
def test_query_heads_that_do_nothing_go_and_plain_transformers_loads_what_is_left(layers, target, tmp_path):
    model, ids = idle(), tokens()
    with torch.no_grad():
        before = model(ids).logits
    limit = size_with(model, 4) * {"params": 1, "bytes": 4}[target]
    shrunk = shrinks.shrink(model, texts(), **{target: limit}, layers=layers, repair=None, **FEW)
    assert shrunk.left == shrunk.limit == getattr(bh.summary(model), target)
    names = [f"model.layers.{number}.self_attn" for number in range(3)]
    assert [shrunk.plan.units[name] for name in names] == list(IDLE)
    assert {shrunk.kept[name] for name in names} == {(2, 2)}
    assert {shrunk.kept[f"{name} query heads"] for name in names} == {(6, 4)}
    assert {shrunk.tried[0].kept[f"{name} query heads"] for name in names} == {4}
    assert "6 -> 4 query, 2 KV heads; without 0, 3" in str(shrunk)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    bh.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (4, 2)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.nightly
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_they_go_beside_all_else_and_with_their_block(layers, tmp_path):
    model, ids = idle(), tokens()
    shrunk = shrinks.shrink(model, texts(), params=int(0.5 * model.num_parameters()), layers=layers, **FEW)
    assert shrunk.left == model.num_parameters() <= shrunk.limit
    assert [choice.left for choice in shrunk.curve] == sorted(choice.left for choice in shrunk.curve)
    stay = [int(name.split(".")[2]) for name, (_, now) in shrunk.kept.items() if name.endswith("self_attn") and now]
    for number, layer in zip(stay, model.model.layers, strict=True):
        name, head = f"model.layers.{number}.self_attn", layer.self_attn.head_dim
        assert shrunk.kept[name][1] == layer.self_attn.k_proj.out_features // head
        assert shrunk.kept[called(name)][1] == layer.self_attn.q_proj.out_features // head < 6
    assert {shrunk.kept[called(f"model.layers.{number}.self_attn")][1] for number in range(3) if number not in stay} <= {0}
    bh.save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "out")(ids).logits, model(ids).logits)


@pytest.mark.daily("llama-params")
@pytest.mark.parametrize(("family", "target"), [("llama", "params"), ("qwen2", "bytes"), ("gemma2", "params")])
def test_a_pair_costs_what_is_left_of_a_model_that_is_really_cut(family, target):
    model = build(family, num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    search, _, (place, *_) = places_of(model, **{target: 0.5})
    assert set(place.pairs) == {(kv, each) for kv in (1, 2) for each in (1, 2, 3)}
    found = [place.cost(kept) for kept in place.allowed]
    assert found == sorted(found, reverse=True)
    for pair in ((2, 1), (1, 3), (1, 2)):
        smaller, kept = copy.deepcopy(model), number_of(place, pair)
        bh.pruning.prune_units(smaller, any_gone(place, search.units, kept))
        assert getattr(search.now, target) - place.saves(kept) == getattr(bh.summary(smaller), target)


def test_whole_kv_heads_go_in_the_same_order_as_ever_and_of_others_the_lowest_query_heads():
    model, (fitted, held_out) = idle(), divided(texts())
    work = Work.begun(model, Amount(params=0.6), uniform=False)
    work.measure(fitted, held_out, bh.OBS(), None)
    units = {name: one for name, one in work.search.units.items() if one.kind == "head"}
    by_kv, by_head = (bh.score(model, units, bh.OBS(), fitted, per=per) for per in ("kv_head", "head"))
    for place in [place for place in work.places if place.pairs]:
        assert torch.equal(work.scores[place.name], by_kv[place.name])
        lowest = int(by_kv[place.name].argmin())
        whole = gone(place, units, work.scores, number_of(place, (1, 3)))[place.name]
        assert whole == [3 * lowest, 3 * lowest + 1, 3 * lowest + 2]
        order = by_head[place.name].view(2, 3).argsort(1)
        ones = [3 * kv + int(order[kv, 0]) for kv in range(2)]
        assert gone(place, units, work.scores, number_of(place, (2, 2)))[place.name] == ones
        both = gone(place, units, work.scores, number_of(place, (1, 2)))[place.name]
        assert both == sorted({*whole, *ones})


@pytest.mark.nightly
def test_without_groups_for_the_cache_and_for_time_nothing_changes():
    _, _, heads = places_of(llama(num_key_value_heads=8), params=0.5)
    assert {(place.count, place.allowed, place.pairs) for place in heads} == {(8, tuple(range(8, 0, -1)), ())}
    model = idle()
    _, _, heads = places_of(model, kv_cache_bytes=0.5)
    assert {(place.count, place.allowed, place.pairs) for place in heads} == {(2, (2, 1), ())}
    assert not any(place.pairs for place in Work.begun(model, Amount(params=0.9), uniform=True, timed=True).places)
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=0.5, repair=None, generations=0)
    assert set(shrunk.kept) == {f"model.layers.{number}.self_attn" for number in range(3)}


def test_with_one_kv_head_query_heads_alone_go():
    model = llama(num_key_value_heads=1)
    search, places, (place, _) = places_of(model, params=0.5)
    assert place.pairs == tuple((1, each) for each in range(1, 9))
    smaller = copy.deepcopy(model)
    bh.pruning.prune_units(smaller, any_gone(place, search.units, 3))
    assert place.saves(3) == search.now.params - smaller.num_parameters()
    shrunk = shrinks.shrink(model, texts(), params=0.6, **FEW)
    assert shrunk.left == model.num_parameters() <= shrunk.limit
    assert {shrunk.kept[name] for place in places for name in place.names if place.kind == "head"} <= {(1, 1), (1, 0)}


def test_of_large_groups_some_pairs_of_each_sort_are_tried():
    found = pairs_of(tuple(range(16, 0, -1)), 8, lambda pair: pair[0] * (1 + pair[1]))
    assert found[-1] == (16, 8)
    assert len(found) <= 16
    assert [kv for kv, each in found if each == 8] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert {each for _, each in found} > {8}


def test_a_class_that_does_not_run_without_query_heads_keeps_those_of_kv_heads_that_stay(monkeypatch):
    def grouped(model, cut, tried=levels.tried):
        if any(after[0] != 3 * after[-1] for name, after in cut.after.items() if name.endswith("attn")):
            raise ValueError("no")
        return tried(model, cut)

    monkeypatch.setattr(levels, "tried", grouped)
    _, places, heads = places_of(idle(), params=0.5)
    assert {(place.count, place.allowed, place.pairs) for place in heads} == {(2, (2, 1), ())}
    assert len(places) == 6


def test_less_is_never_said_to_lose_less_and_what_loses_more_for_more_is_left_out():
    model, (fitted, held_out) = idle(), divided(texts())
    work = Work.begun(model, Amount(params=0.6), uniform=False)
    work.measure(fitted, held_out, bh.OBS(), None)
    place = next(place for place in work.places if place.pairs)
    lost = dict(zip(place.levels(), damages(work.library, work.divergence, place, place.levels()), strict=True))
    assert lost[place.count] == 0
    assert all(lost[more] <= lost[fewer] for more in lost for fewer in lost if place.holds(more, fewer))
    (slot,) = make_slots([place], work.levels, work.losses, uniform=False)
    assert slot.kept[0] == place.count
    assert list(slot.losses) == sorted(slot.losses)
    assert place.holds(number_of(place, (2, 2)), number_of(place, (1, 2)))
    assert not place.holds(number_of(place, (2, 2)), number_of(place, (1, 3)))


def test_a_library_goes_on_and_that_of_other_pairs_is_another(tmp_path, monkeypatch):
    model, (fitted, held_out) = idle(), divided(texts())
    work = Work.begun(model, Amount(params=0.6), uniform=False)
    work.measure(fitted, held_out, bh.OBS(), None, tmp_path)
    whole = Work.begun(model, Amount(params=0.6), uniform=False, timed=True)
    assert not any(place.pairs for place in whole.places)
    whole.measure(fitted, held_out, bh.OBS(), None, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(variants, "watch", None)  # nothing is run for it again
    again = Work.begun(model, Amount(params=0.8), uniform=False)
    again.measure(fitted, held_out, bh.OBS(), None, tmp_path)
    assert again.losses == work.losses
    assert len(list(tmp_path.iterdir())) == 2
