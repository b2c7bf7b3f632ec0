"""Every criterion against an independent computation of its paper's formula, and what all of them promise."""

import copy
import inspect
import itertools

import pytest
import torch

from billhook.engine.statistics import InputNorms
from billhook.sparsity.criteria import RIA, Criterion, Magnitude, Random, Wanda, WandaAlpha
from billhook.sparsity.masks import pruned_count, sparsity_of
from billhook.sparsity.sparsegpt import SparseGPT
from kit.sparsity import CRITERIA, IN, OUT, make_inputs, seen, stable_sort_layer, stable_sort_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


ROWWISE = [kind for kind in CRITERIA if "compares" in inspect.signature(kind).parameters]


@pytest.fixture(params=CRITERIA, ids=lambda kind: kind.__name__)
def criterion(request):
    return request.param()


# what all criteria promise


@pytest.mark.daily("Wanda-*", "SparseGPT-*", "*-dtype0-0.5", "*-dtype2-0.95")
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_unstructured(criterion, sparsity, dtype):
    weight = torch.randn(OUT, IN).to(dtype)
    before = weight.clone()
    pruned, keep = criterion.prune(weight, seen(criterion, make_inputs()), sparsity)
    if isinstance(criterion, SparseGPT):
        blocks = [min(criterion.block_size, IN - start) for start in range(0, IN, criterion.block_size)]
        assert [int((~k).sum()) for k in keep.split(criterion.block_size, 1)] == [pruned_count(OUT * b, sparsity) for b in blocks]
    elif criterion.compares == "row":
        assert (~keep).sum(1).eq(pruned_count(IN, sparsity)).all()
    else:
        assert (~keep).sum() == pruned_count(OUT * IN, sparsity)
    check_contract(criterion, weight, before, pruned, keep)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "5:32"])
def test_contract_n_of_m(criterion, pattern):
    weight = torch.randn(OUT, IN)
    n, m = (int(number) for number in pattern.split(":"))
    before = weight.clone()
    pruned, keep = criterion.prune(weight, seen(criterion, make_inputs()), pattern=pattern)
    assert keep.reshape(-1, m).sum(1).eq(n).all()
    check_contract(criterion, weight, before, pruned, keep)


def check_contract(criterion, weight, before, pruned, keep):
    assert weight.equal(before)
    assert pruned.dtype == weight.dtype
    assert keep.dtype == torch.bool
    assert torch.isfinite(pruned).all()
    assert pruned[~keep].eq(0).all()
    if not criterion.updates:
        assert pruned[keep].equal(weight[keep])


@pytest.mark.parametrize("kind", ROWWISE)
@pytest.mark.parametrize("compares", ["row", "layer"])
def test_either_comparison(kind, compares):
    criterion, weight = kind(compares=compares), torch.randn(OUT, IN) * torch.rand(OUT, 1)
    _, keep = criterion.prune(weight, seen(criterion, make_inputs()), 0.5)
    assert (len(set(keep.sum(1).tolist())) == 1) == (compares == "row")


def test_zeros_go_first_so_pruning_again_goes_on(criterion):
    weight, statistics = torch.randn(OUT, IN), seen(criterion, make_inputs())
    assert criterion.score(weight.masked_fill(torch.eye(OUT, IN).bool(), 0), statistics)[torch.eye(OUT, IN).bool()].eq(0).all()
    if not isinstance(criterion, SparseGPT):
        once, first = criterion.prune(weight, statistics, 0.3)
        twice, second = criterion.prune(once, statistics, 0.6)
        assert not (second & ~first).any()
        assert criterion.prune(once, statistics, 0.3)[1].equal(first)
        assert sparsity_of([twice]) == pytest.approx(0.6, abs=0.01)


def test_dead_inputs_and_outputs_go_first(criterion):
    weight, inputs = torch.randn(OUT, IN), make_inputs()
    inputs[:, ::4] = 0
    weight[3], weight[:, 5] = 0, 0
    pruned, keep = criterion.prune(weight, seen(criterion, inputs), 0.5)
    assert torch.isfinite(pruned).all()
    if criterion.statistics(IN) is not None:
        assert not keep[torch.arange(OUT) != 3, ::4].any()
    everything = criterion.statistics(IN)
    if everything is not None:
        everything.add(torch.zeros(3, IN))
        assert torch.isfinite(criterion.prune(weight, everything, 0.5)[0]).all()


def test_memory_layout_does_not_matter(criterion):
    weight, statistics = torch.randn(OUT, IN), seen(criterion, make_inputs())
    pruned, keep = criterion.prune(weight, statistics, 0.5)
    other, same = criterion.prune(weight.t().contiguous().t(), statistics, 0.5)
    assert keep.equal(same)
    assert pruned.equal(other)


def test_scores_are_float32(criterion):
    weight = torch.randn(OUT, IN)
    for dtype in (*DTYPES, torch.float64):
        score = criterion.score(weight.to(dtype).requires_grad_(), seen(criterion, make_inputs()))
        assert (score.dtype, score.shape, score.requires_grad) == (torch.float32, (OUT, IN), False)
        assert torch.isfinite(score).all()


def test_autocast_changes_nothing(criterion):
    weight, statistics = torch.randn(OUT, IN), seen(criterion, make_inputs())
    pruned, keep = criterion.prune(weight, statistics, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        other, same = criterion.prune(weight, statistics, 0.5)
    assert keep.equal(same)
    assert pruned.equal(other)


def test_settings_are_plain_values(criterion):
    kind = type(criterion)
    assert criterion == kind() == copy.deepcopy(criterion)
    assert hash(criterion) == hash(kind())
    assert eval(repr(criterion), {one.__name__: one for one in CRITERIA}) == criterion
    with pytest.raises(AttributeError):
        criterion.compares = "row"


# the papers' formulas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_wanda_is_the_papers_bit_for_bit(dtype, sparsity):
    weight, sequences = torch.randn(OUT, IN).to(dtype), make_inputs().view(8, 50, IN)
    mean = torch.zeros(IN)
    for number, sequence in enumerate(sequences, 1):  # the authors' running mean over sequences
        mean = mean * ((number - 1) / number) + sequence.t().norm(dim=1) ** 2 / number
    statistics = InputNorms(IN)
    statistics.add(sequences)
    torch.testing.assert_close(statistics.squares, mean * 8)
    statistics.squares.copy_(mean)
    metric = weight.abs() * torch.sqrt(mean.reshape(1, -1))
    assert metric.dtype == torch.float32
    pruned, keep = Wanda().prune(weight, statistics, sparsity)
    assert keep.equal(stable_sort_rows(metric, int(IN * sparsity)))
    _, keep = Wanda().prune(weight, statistics, pattern="2:4")
    assert keep.equal(stable_sort_rows(metric.view(-1, 4), 2).view(OUT, IN))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_wanda_alpha_cuts_each_row_at_one_share_of_its_sum(sparsity):
    weight, inputs = torch.randn(OUT, IN) * torch.randn(OUT, IN), make_inputs()
    statistics = seen(Wanda(), inputs)
    _, keep = WandaAlpha().prune(weight, statistics, sparsity)
    metric = (weight.abs() * statistics.squares.sqrt()).double()

    def at(alpha):
        keep = torch.ones(OUT, IN, dtype=torch.bool)
        for row in range(OUT):
            total = 0.0
            for column in metric[row].argsort(stable=True):
                total += float(metric[row, column])
                keep[row, column] = total > alpha * float(metric[row].sum())
        return keep

    low, high = 0.0, 0.8
    while abs(sparsity_of([found := at(alpha := (low + high) / 2)]) - sparsity) > 1e-3:
        low, high = (low, alpha) if sparsity_of([found]) > sparsity else (alpha, high)
    assert (found != keep).double().mean() <= 1e-3
    assert len(set(keep.sum(1).tolist())) > 3
    removed = (metric * ~keep).sum(1) / metric.sum(1)
    with_next = removed + metric.masked_fill(~keep, torch.inf).amin(1) / metric.sum(1)
    assert removed.max() <= with_next.min() + 1e-6


def test_magnitude():
    weight = torch.randn(OUT, IN)
    assert Magnitude().prune(weight, None, 0.3)[1].equal(stable_sort_layer(weight.abs(), int(OUT * IN * 0.3)))
    assert Magnitude("row").prune(weight, None, 0.3)[1].equal(stable_sort_rows(weight.abs(), 48))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_ria(exponent):
    weight, inputs = torch.randn(6, 8), make_inputs(8)
    score = RIA(exponent).score(weight, seen(RIA(), inputs))
    size = weight.abs().double()
    for i, j in itertools.product(range(6), range(8)):
        relative = size[i, j] / sum(size[k, j] for k in range(6)) + size[i, j] / sum(size[i, k] for k in range(8))
        assert float(score[i, j]) == pytest.approx(float(relative * inputs[:, j].double().norm() ** exponent), rel=1e-5)


def test_random():
    weight = torch.randn(OUT, IN)
    scores = Random(seed=3).score(weight)
    assert scores.equal(Random(seed=3).score(weight.clone()))
    assert not scores.equal(Random(seed=4).score(weight))
    assert not scores.equal(Random(seed=3).score(torch.randn(OUT, IN)))
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.02)
    assert scores.min() > 0


# what is refused


def test_bad_weights_are_refused(criterion):
    statistics = seen(criterion, make_inputs())
    for value, dtype in itertools.product((torch.nan, torch.inf, -torch.inf), DTYPES):
        weight = torch.randn(OUT, IN).to(dtype)
        weight[2, 3] = value
        with pytest.raises(ValueError, match="the weight contains NaN or inf"):
            criterion.prune(weight, statistics, 0.5)


def test_an_update_that_does_not_fit_is_refused():
    weight, statistics = torch.full((OUT, IN), 6e4).half(), seen(SparseGPT(), make_inputs())
    Wanda().prune(weight, statistics, 0.5)
    with pytest.raises(ValueError, match="the updated weight, as torch.float16, contains NaN or inf"):
        SparseGPT().prune(weight, statistics, 0.5)


def test_bad_statistics_are_refused(criterion):
    weight, inputs = torch.randn(OUT, IN), make_inputs()
    if criterion.statistics(IN) is None:
        return
    with pytest.raises(ValueError, match=r"needs (Input)?\w+ of the layer's inputs \(calibration data\), got none"):
        criterion.prune(weight, None, 0.5)
    with pytest.raises(ValueError, match="statistics of 8 input features do not fit a weight of 160"):
        criterion.prune(weight, seen(criterion, make_inputs(8)), 0.5)
    with pytest.raises(ValueError, match="no inputs were seen"):
        criterion.prune(weight, criterion.statistics(IN), 0.5)
    inputs[0, 7] = torch.inf
    with pytest.raises(ValueError, match="in 1 of 160 input features, the first in feature 7"):
        criterion.prune(weight, seen(criterion, inputs), 0.5)


def test_bad_amounts_are_refused(criterion):
    weight, statistics = torch.randn(OUT, 30), seen(criterion, make_inputs(30))
    for sparsity, pattern, message in [
        (1.0, "unstructured", "sparsity=1.0 must be"),
        (None, "unstructured", "sparsity=None"),
        (0.6, "2:4", "contradicts"),
        (None, "4:2", "pattern='4:2'"),
        (None, "2:4", "needs a multiple of 4 input features, got 30"),
    ]:
        with pytest.raises(ValueError, match=message):
            criterion.prune(weight, statistics, sparsity, pattern)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Wanda(compares="column"), "compares='column' must be one of"),
    (lambda: Random(compares=0), "compares=0 must be"),
    (lambda: RIA(exponent=-1), "exponent=-1 must be"),
    (lambda: RIA(compares="matrix"), "compares='matrix' must be"),
    (lambda: SparseGPT(damping=0), r"damping=0 must be in .0, 1."),
    (lambda: SparseGPT(damping=2.0), "damping=2.0 must be"),
    (lambda: SparseGPT(block_size=0), "block_size=0 must be"),
    (lambda: SparseGPT(block_size=1.5), "block_size=1.5 must be"),
    (lambda: SparseGPT(block_size=6).prune(torch.ones(2, 8), None, pattern="2:4"), "block_size=6 must be a multiple of 4"),
    (lambda: SparseGPT().prune(torch.ones(2, 8), InputNorms(8), 0.5), "SparseGPT needs InputGram .* got InputNorms"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_users_own_criterion_needs_only_its_score():
    class Smallest(Criterion):
        compares = "row"

        def score(self, weight, statistics=None):
            return -weight.abs()

    pruned, _ = Smallest().prune(torch.tensor([[1.0, 3.0, -2.0, 4.0]]), sparsity=0.5)
    assert pruned.tolist() == [[1, 0, -2, 0]]
