"""Planted groups are found, against all partitions; another order of heads alone changes nothing."""

import functools
import itertools

import pytest
import torch

from billhook.engine.batches import Run
from billhook.kv_heads.basis import find_bases, similar_order
from billhook.kv_heads.layout import find_projections, read
from billhook.kv_heads.methods import SVD, method_of
from billhook.kv_heads.moments import weight_moments
from billhook.kv_heads.symmetry import find_symmetries
from billhook.tracing.trace import trace
from kit.families import tokens
from kit.kv_zoo import mixed, model_of, moments_of, with_stacks


def partitions(heads, groups):
    """All ways to divide heads into groups of one size."""
    if not heads:
        yield []
        return
    for rest in itertools.combinations(heads[1:], len(heads) // groups - 1):
        group = [heads[0], *rest]
        for others in partitions([head for head in heads if head not in group], groups - 1) if groups > 1 else [[]]:
            yield [group, *others]


def shuffled(model, order):
    """Pairs of heads that are mixes of one another, in an order in which they do not stand beside each other."""
    for name, place in find_projections(model, trace(model)).items():
        symmetries = find_symmetries(model, {name: place})[name]
        stacks = mixed(read(model, place), symmetries, groups=len(order) // 2)
        with_stacks(model, place, stacks.in_order(order))
    return model


@pytest.mark.parametrize("start", ["svd", "aligned"])
@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("llama", 8), ("gpt2", 4)])
def test_planted_pairs_are_found(family, heads, start):
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(3)).tolist()
    model = shuffled(model_of(family, heads), order)
    places = find_projections(model, trace(model))
    found = moments_of(model, places, dict.fromkeys(places, 1), [Run(lambda: model(tokens(4, 40)).logits.sum())])
    symmetries = find_symmetries(model, places)
    for name, place in places.items():
        new = similar_order(read(model, place), found[name], symmetries[name], method_of(start), heads // 2)
        assert sorted(new) == list(range(heads))
        pairs = {frozenset(order[head] // 2 for head in new[number : number + 2]) for number in range(0, heads, 2)}
        assert pairs == {frozenset([number]) for number in range(heads // 2)}
        firsts = new[::2]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2), (6, 3), (8, 4)])
def test_no_other_grouping_loses_less_over_its_pairs(heads, groups):
    torch.manual_seed(heads)
    model = model_of("llama", heads)
    (place, *_) = find_projections(model, trace(model)).values()
    stacks, symmetries = read(model, place), find_symmetries(model, {place.name: place})[place.name]
    moments = weight_moments(stacks, 1)
    new = similar_order(stacks, moments, symmetries, SVD(), groups)

    @functools.cache
    def together(pair):
        two = stacks.in_order(pair)
        return sum(own.lost for own in find_bases(two, weight_moments(two, 1), symmetries, SVD()))

    def loses(partition):
        return sum(together(pair) for group in partition for pair in itertools.combinations(sorted(group), 2))

    size = heads // groups
    least = min(map(loses, partitions(list(range(heads)), groups)))
    assert loses([new[number : number + size] for number in range(0, heads, size)]) == pytest.approx(least, rel=1e-9)


def test_equal_heads_stay_where_they_are():
    model = model_of("llama", 4)
    (place, *_) = find_projections(model, trace(model)).values()
    stacks = read(model, place)
    stacks = type(stacks)(stacks.q[:1].expand(4, -1, -1), *(one[:1].expand(4, -1, -1) for one in (stacks.k, stacks.v, stacks.o)))
    symmetries = find_symmetries(model, {place.name: place})[place.name]
    assert similar_order(stacks, weight_moments(stacks, 1), symmetries, SVD(), 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bart"])
def test_another_order_alone_changes_no_logits_and_has_the_moments_that_it_is_said_to_have(family):
    model, order = model_of(family, 4), [2, 0, 3, 1]
    places, ids = find_projections(model, trace(model)), tokens(3, 20)
    run = (lambda: model(ids, decoder_input_ids=ids[:, :9]).logits) if family == "bart" else lambda: model(ids).logits
    runs = [Run(lambda: run().sum())]
    before, logits = moments_of(model, places, dict.fromkeys(places, 1), runs), run()
    for place in places.values():
        with_stacks(model, place, read(model, place).in_order(order))
    torch.testing.assert_close(run(), logits)
    whole = moments_of(model, places, dict.fromkeys(places, 1), runs)
    after = moments_of(model, places, dict.fromkeys(places, 2), runs)
    for name in places:
        found = before[name].in_order(order, 2)
        torch.testing.assert_close(found.queries, after[name].queries)
        for part in ("keys", "values"):  # as all query heads of the attention see them
            moments, of_all = getattr(found, part), getattr(whole[name], part)
            for group, own in enumerate((slice(0, 2), slice(2, 4))):
                torch.testing.assert_close(moments[group], of_all[0][own, :, own])
            assert moments.shape == getattr(after[name], part).shape
