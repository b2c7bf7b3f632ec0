"""How much each layer gives, against the papers' formula, and that the whole comes to what was asked."""

from inspect import isabstract

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.sparsity.allocation import OWL, Allocation, ByPattern, Uniform

BLOCKS = [{"0.up": 60, "0.down": 40}, {"1.up": 60, "1.down": 40}, {"2.up": 60, "2.down": 40}]


def whole(blocks, amounts):
    sizes = {name: size for block in blocks for name, size in block.items()}
    return sum(amounts[name] * size for name, size in sizes.items()) / sum(sizes.values())


def test_uniform():
    assert Uniform().allocate(BLOCKS, 0.5) == dict.fromkeys(["0.up", "0.down", "1.up", "1.down", "2.up", "2.down"], 0.5)


def test_by_pattern_the_first_match_holds():
    amounts = ByPattern({"0.*": 0, "*.down": 0.25, "[12].*": 0.75}).allocate(BLOCKS, 0.5)
    assert amounts == {"0.up": 0, "0.down": 0, "1.up": 0.75, "1.down": 0.25, "2.up": 0.75, "2.down": 0.25}
    assert ByPattern({"1.up": 0.9}).allocate(BLOCKS, 0.5)["1.down"] == 0.5


def test_owl_measures_outliers_over_the_whole_block():
    scores = [torch.rand(20, 30) ** 6, torch.rand(10, 20) ** 8]
    flat = [float(value) for one in scores for value in one.flatten()]
    mean = sum(flat) / len(flat)
    assert OWL().measure(scores) == pytest.approx(100 * sum(value > 5 * mean for value in flat) / len(flat))
    assert OWL(multiple=1e9).measure(scores) == 0
    assert OWL().measure([torch.zeros(3, 3)]) == 0


def test_owl_is_the_papers():
    measured, sparsity, lam = [3.0, 0.5, 1.0], 0.7, 0.08
    scaled = [(d - 0.5) / 2.5 * 2 * lam for d in measured]
    expected = [sparsity - (d - sum(scaled) / 3) for d in scaled]
    amounts = OWL(lam).allocate(BLOCKS, sparsity, measured)
    assert [amounts[f"{block}.up"] for block in range(3)] == pytest.approx(expected)
    assert [amounts[f"{block}.down"] for block in range(3)] == pytest.approx(expected)
    assert amounts["1.up"] - amounts["0.up"] == pytest.approx(2 * lam)


def test_owl_without_differences_is_uniform():
    assert OWL().allocate(BLOCKS, 0.5, [2.0] * 3) == pytest.approx(Uniform().allocate(BLOCKS, 0.5))
    assert OWL(lam=0).allocate(BLOCKS, 0.5, [1.0, 2.0, 3.0]) == pytest.approx(Uniform().allocate(BLOCKS, 0.5))


@given(
    blocks=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 100)), min_size=1, max_size=8),
    sparsity=st.floats(0, 1, exclude_max=True),
    lam=st.floats(0, 0.5),
)
@settings(deadline=None)
def test_owl_keeps_the_whole_and_stays_within_bounds(blocks, sparsity, lam):
    sizes = [{str(number): size} for number, (size, _) in enumerate(blocks)]
    measured = [outliers for _, outliers in blocks]
    amounts = OWL(lam).allocate(sizes, sparsity, measured)
    assert whole(sizes, amounts) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= amount < 1 for amount in amounts.values())
    ordered = sorted(range(len(blocks)), key=measured.__getitem__)
    assert all(amounts[str(a)] >= amounts[str(b)] for a, b in zip(ordered, ordered[1:], strict=False))


def all_allocations(parent=Allocation):
    for kind in parent.__subclasses__():
        yield from [*([] if isabstract(kind) else [kind]), *all_allocations(kind)]


SETTINGS = {"ByPattern": {"sparsities": {"*.up": 0.25}}, "OWL": {"lam": 0.1}}
EVERY = [kind for kind in all_allocations() if kind.__module__.startswith("billhook.")]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_every_allocation_gives_each_linear_a_legal_sparsity(kind, sparsity):
    allocation = kind(**SETTINGS.get(kind.__name__, {}))
    scores = [[torch.rand(6, 10) ** power, torch.rand(4, 10) ** power] for power in (1, 9, 3)]
    before = [one.clone() for block in scores for one in block]
    measured = [allocation.measure(block) for block in scores] if allocation.measures else ()
    assert all(torch.equal(one, old) for one, old in zip([one for block in scores for one in block], before, strict=True))
    amounts = allocation.allocate(BLOCKS, sparsity, measured)
    assert list(amounts) == [name for block in BLOCKS for name in block]
    assert all(0 <= amount < 1 for amount in amounts.values())
    assert amounts == allocation.allocate(BLOCKS, sparsity, measured)
    if kind is not ByPattern:
        assert whole(BLOCKS, amounts) == pytest.approx(sparsity)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="sparsity=.* must be"):
            allocation.allocate(BLOCKS, wrong, measured)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Uniform().allocate(BLOCKS, 1.0), "sparsity=1.0 must be"),
    (lambda: ByPattern({}), "sparsities={} must have at least one pattern"),
    (lambda: ByPattern({"*": 1.5}), r"sparsities\['\*'\]: sparsity=1.5 must be"),
    (
        lambda: ByPattern({"*.up": 0.5, "*.gate": 0.5}).allocate(BLOCKS, 0.5),
        r"'\*.gate'\] matches none of the 6 linear layers",
    ),
    (lambda: ByPattern({"*": 0.5}).allocate(BLOCKS, -1), "sparsity=-1 must be"),
    (lambda: OWL(lam=0.6), r"lam=0.6 must be in \[0, 0.5\]"),
    (lambda: OWL(multiple=0), "multiple=0 must be a number above 0"),
    (lambda: OWL().allocate(BLOCKS, 0.5), "measured must have a value for each of the 3 blocks, got 0"),
    (lambda: OWL().allocate(BLOCKS, 2, [1, 2, 3]), "sparsity=2 must be"),
])  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
