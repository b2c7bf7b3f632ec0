"""The axis algebra by itself, against maps that list for each position which indices of which leaves it is."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billhook.tracing.axes import (
    Axis,
    Irregular,
    concat,
    crossed,
    cut,
    factors,
    find,
    layout,
    leaves,
    mark,
    multiplied_with,
    notes_of,
    product,
    segments,
    split,
    unify,
)

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
many = settings(max_examples=150, deadline=2000, derandomize=True, database=None, suppress_health_check=SLOW)


def places(axis):
    """For each position its (leaf, index), outermost first; what has size 1 has no identity."""
    axis = find(axis)
    if axis.op == "leaf":
        return [((axis, i),) if axis.size != 1 else () for i in range(axis.size)]
    parts = [places(part) for part in axis.parts]
    return sum(parts, []) if axis.op == "sum" else [sum(one, ()) for one in itertools.product(*parts)]


def may_cut(axis, at):
    """Whether a position is one between two segments, or one of a leaf, or one of the first factor of a product."""
    axis = find(axis)
    if at in (0, axis.size) or axis.op == "leaf":
        return True
    if axis.op == "product":
        first, *inner = [part for part in axis.parts if part.size > 1]
        width = axis.size // first.size
        return at % width == 0 and may_cut(first, at // width)
    for part in axis.parts:
        if at <= part.size:
            return may_cut(part, at)
        at -= part.size
    raise AssertionError


@st.composite
def grown(draw, size, pool, depth=3, ops=("leaf", "sum", "product")):
    """An axis of a size; of each size there are three leaves at most, so that many stand in several places."""
    divisors = [d for d in range(2, size) if size % d == 0]
    op = draw(st.sampled_from([op for op in ops if op == "leaf" or (depth and (divisors if op == "product" else size > 1))]))
    if op == "product":
        outer = draw(st.sampled_from(divisors))
        return product([draw(grown(outer, pool, depth - 1, ops)), draw(grown(size // outer, pool, depth - 1, ops))])
    if op == "sum":
        at = draw(st.integers(1, size - 1))
        return concat([draw(grown(at, pool, depth - 1, ops)), draw(grown(size - at, pool, depth - 1, ops))])
    key = (size, draw(st.integers(0, 2)))
    return pool.setdefault(key, Axis(size, notes={f"flag {key}": "by name"}))


class World:
    """Axes that share leaves, what they were at first, and what must hold whatever is done to them."""

    def __init__(self, draw, ops, sizes):
        pool, size = {}, draw(st.sampled_from(sizes))
        self.axes = [draw(grown(size, pool, ops=ops)) for _ in range(3)]
        self.leaves = list(pool.values())
        self.held = [*self.axes, *self.leaves]
        self.text = f"{self.axes}"
        self.first = [places(axis) for axis in self.axes]
        self.atoms = [atom for leaf in self.leaves if leaf.size > 1 for (atom,) in places(leaf)]

    def __repr__(self):
        return self.text

    def tried(self, operation, *args):
        """What an operation gives, None if it is irregular; either way all that is held is what it was, said in newer leaves."""
        before = [places(axis) for axis in self.held]
        old = {leaf: dict(leaf.notes) for axis in self.held for leaf in leaves(axis)}
        try:
            result = operation(*args)
        except Irregular:
            result = None
        became = {leaf: places(leaf) for leaf in old}
        for axis, was in zip(self.held, before, strict=True):
            assert places(axis) == [sum([became[leaf][i] for leaf, i in place], ()) for place in was]
            assert len(places(axis)) == axis.size == find(axis).size
        for leaf, notes in old.items():
            assert all(notes.keys() <= now.notes.keys() for now in leaves(leaf) if now.size > 1)
        return result

    def hold(self, parts, joined):
        self.held.append(joined(parts))
        return self.held[-1]


def worlds(ops=("leaf", "sum", "product"), sizes=(4, 6, 8, 12)):
    return st.composite(lambda draw: World(draw, ops, sizes))()


PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3)


@many
@given(worlds(), PAIRS)
def test_layout_crossed_and_beside_say_what_the_positions_say(world, pairs):
    for i, j in pairs:
        for axis in world.held:
            at, seen = places(axis), [leaf for leaf in dict.fromkeys(leaves(axis)) if leaf.size > 1]
            assert {leaf for place in at for leaf, _ in place} == set(seen)
            for leaf in seen:
                assert layout(axis, leaf).tolist() == [max([n for one, n in place if one is leaf], default=-1) for place in at]
                assert layout(axis, leaf).dtype == np.int64
                assert crossed(axis, leaf) == any(sum(one is leaf for one, _ in place) > 1 for place in at)
                if not crossed(axis, leaf):
                    there = [{one for one, _ in place} for place in at if any(one is leaf for one, _ in place)]
                    others = {one for one in multiplied_with(axis, leaf) if one.size > 1}
                    assert set.intersection(*there) - {leaf} <= others <= set.union(*there) - {leaf}
            assert (layout(axis, Axis(5)) == -1).all()
        world.tried(unify, world.axes[i], world.axes[j])


@many
@given(worlds(), st.data())
def test_a_cut_gives_the_two_ends(world, data):
    for _ in range(2):
        axis = data.draw(st.sampled_from(world.held))
        at = data.draw(st.integers(0, axis.size))
        possible = may_cut(axis, at)
        result = world.tried(cut, axis, at)
        assert (result is not None) == possible
        if result is not None:
            low, high = (world.hold(part, concat) for part in result)
            assert (low.size, high.size) == (at, axis.size - at)
            assert places(low) + places(high) == places(axis)


@many
@given(worlds(), st.data())
def test_a_split_takes_positions_by_quotient_and_remainder(world, data):
    for _ in range(2):
        axis = data.draw(st.sampled_from(world.held))
        outer = data.draw(st.integers(1, axis.size + 1))
        leaf = find(axis).op == "leaf"
        result = world.tried(split, axis, outer)
        if result is not None:
            head, tail = (world.hold(part, product) for part in result)
            assert (head.size, tail.size * outer) == (outer, axis.size)
            heads, tails = places(head), places(tail)
            assert places(axis) == [heads[p // tail.size] + tails[p % tail.size] for p in range(axis.size)]
        assert (axis.size % outer == 0 and leaf) <= (result is not None) <= (axis.size % outer == 0)


@many
@given(worlds(), PAIRS)
def test_unified_axes_are_the_same_and_stay_so(world, pairs):
    done = []
    for i, j in pairs:
        a, b = world.axes[i], world.axes[j]
        free = "leaf" in (find(a).op, find(b).op) or {find(part).op for part in [*segments(a), *segments(b)]} == {"leaf"}
        result = world.tried(unify, a, b)
        assert result is not None or not free
        if result is not None:
            done.append((a, b))
            assert result is find(a) is find(b)
            now = [places(axis) for axis in world.held]
            assert unify(b, a) is result
            assert [places(axis) for axis in world.held] == now
        assert all(places(one) == places(other) for one, other in done)


@many
@given(worlds(ops=("leaf", "sum")), PAIRS)
def test_sums_are_merged_where_positions_are_and_nowhere_else(world, pairs):
    same = {atom: {atom} for atom in world.atoms}
    for i, j in pairs:
        assert world.tried(unify, world.axes[i], world.axes[j]) is not None
        for left, right in zip(world.first[i], world.first[j], strict=True):
            joined = set().union(*[same[atom] for atom in [*left, *right]])
            same.update(dict.fromkeys(joined, joined))
    now = {(leaf, i): place for leaf in world.leaves if leaf.size > 1 for i, place in enumerate(places(leaf))}
    for one, other in itertools.combinations(world.atoms, 2):
        if now[one]:
            assert (now[one] == now[other]) == (other in same[one])


@many
@given(worlds(sizes=(4, 6)), PAIRS)
def test_what_is_merged_had_to_be_even_where_it_fails_halfway(world, pairs):
    """A position goes when one of its indices goes. Whatever may go such that unified positions go together, merged ones do."""
    if len(world.atoms) > 12:
        return
    column = {atom: n for n, atom in enumerate(world.atoms)}
    gone = (np.arange(2 ** len(column))[:, None] >> np.arange(len(column))) & 1 == 1
    for leaf in world.leaves:
        if leaf.size > 1:
            gone = gone[~gone[:, [column[leaf, i] for i in range(leaf.size)]].all(1)]  # of each leaf something stays
    for i, j in pairs:
        world.tried(unify, world.axes[i], world.axes[j])
        for left, right in zip(world.first[i], world.first[j], strict=True):
            gone = gone[gone[:, [column[a] for a in left]].any(1) == gone[:, [column[a] for a in right]].any(1)]
    now = {(leaf, i): place for leaf in world.leaves if leaf.size > 1 for i, place in enumerate(places(leaf))}
    for atom, place in now.items():
        if not place:  # only pieces of size 1, which stay
            gone = gone[~gone[:, column[atom]]]
    for one, other in itertools.combinations(world.atoms, 2):
        if now[one] and now[one] == now[other]:
            assert (gone[:, column[one]] == gone[:, column[other]]).all()


def axes(*sizes):
    return [Axis(n) for n in sizes]


def test_products_and_sums_are_flat():
    a, b, c, one, none = axes(2, 3, 4, 1, 0)
    assert factors(product([product([a, one]), product([b, product([c])])])) == [a, b, c]
    assert segments(concat([concat([a, none]), concat([b, concat([c, one])])])) == [a, b, c, one]
    assert product([one, a]) is a
    assert concat([none, a]) is a
    assert (product([]).size, concat([]).size, product([one, one]).size, concat([none]).size) == (1, 0, 1, 0)
    assert leaves(product([a, concat([b, a])])) == [a, b, a]
    assert repr(product([a, concat([b, c])])) == f"(a{a.number}:2 * (a{b.number}:3 + a{c.number}:4))"


def test_notes_pass_to_pieces_and_to_what_is_unified():
    a, b, c = axes(6, 2, 3)
    mark(a, "const", "first")
    mark(product([a, b]), "const", "second")
    mark(c, "normed")
    assert (a.notes, b.notes) == ({"const": "first"}, {"const": "second"})
    low, _ = cut(a, 3)
    assert low[0].notes == {"const": "first"}
    unify(c, concat(low))
    assert notes_of(c) == {"const": "first", "normed": ""}
    assert all(find(leaf).notes.keys() >= {"const"} for leaf in leaves(a))
    assert notes_of(concat([b, Axis(5)])) == {"const": "second"}


def test_sizes_0_and_1_have_no_identity():
    a, b, none, some = axes(1, 1, 0, 3)
    unify(a, b)
    unify(none, Axis(0))
    assert find(a) is not find(b)
    empty = product([none, some])
    assert (empty.size, places(empty), layout(empty, some).tolist()) == (0, [], [])
    assert [concat(part).size for part in cut(empty, 0)] == [0, 0]
    assert product(split(some, 3)[0]) is some
    for axis, outer in ((none, 2), (none, 0), (some, 0), (some, 2), (some, 6)):
        with pytest.raises(Irregular, match="no outer part"):
            split(axis, outer)


def test_what_cannot_be_the_same():
    a = Axis(4)
    with pytest.raises(Irregular, match="different sizes"):
        unify(a, Axis(5))
    with pytest.raises(Irregular, match="is made of"):
        unify(Axis(4, "product", [a, Axis(1)]), a)
