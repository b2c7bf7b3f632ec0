"""What ranks send each other in an event, in bytes, as `docs/evidence/distributed.md` reckons it: what is sent is counted."""

import copy

import pytest

import billhook as bh
from billhook.engine.comm import MESSAGE, Comm
from kit.families import tokens
from kit.ranks import Ranks
from kit.sent import linears, solved, wanda
from kit.sent import model as make

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def model():
    return make()


def batches():
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(4) for _ in range(4))]


def sent_in(model, work):
    """Bytes of each sum over two ranks in a piece of work on a model."""
    copies, found = [copy.deepcopy(model) for _ in range(2)], []

    def counted(rank, comm):
        def add(tensor):
            if not rank:
                found.append(tensor.numel() * tensor.element_size())
            return comm(tensor)

        work(copies[rank], Comm(add, rank, 2))

    Ranks(2).run(counted)
    return found


@pytest.mark.parametrize(
    ("criterion", "reckoned"),
    [(bh.Magnitude(), lambda _: 0), (bh.Wanda(), wanda), (bh.SparseGPT(), solved), (bh.criteria.Refit(), solved)],
)
def test_criteria(model, criterion, reckoned):
    found = sent_in(model, lambda model, comm: bh.prune(model, criterion, batches(), sparsity=0.5, reduce=comm, dry_run=True))
    blocks, number = len(model.model.layers), len(linears(model))
    # of tokens, of which linears read the same, and of batches
    numbers = 48 * number + (2 * blocks + 2) * MESSAGE if criterion.needs else 0
    assert reckoned(model) <= sum(found) <= reckoned(model) + numbers
    # of each block: where runs wait, which linears read the same, and statistics (tokens are integers); of each linear that
    # is solved for, its weights and its mask; of all: how many batches there are, how many tokens, and where runs wait
    assert len(found) <= (4 * blocks + 2 * number * criterion.updates + 4) * bool(criterion.needs)


@pytest.mark.parametrize("importance", [bh.OutputNorm(), bh.OBS(), bh.Taylor()])
def test_importances(model, importance):
    found = sent_in(model, lambda model, comm: bh.plan(model, importance, batches(), channels=0.25, reduce=comm))
    units = sum(layer.mlp.down_proj.in_features for layer in model.model.layers)
    assert found[0] == 16 * units  # what is summed; then the first rank's scores
    assert len(found) <= 3
    assert 4 * units <= sum(found[1:]) <= 4 * units + 2 * MESSAGE


def test_repair(model):
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
    found = sent_in(model, lambda model, comm: bh.repair(model, plan, batches(), reduce=comm))
    reckoned = 0
    for layer in model.model.layers:
        out, kept = layer.mlp.down_proj.out_features, layer.mlp.down_proj.in_features * 3 // 4
        reckoned += 2 * 8 * (kept**2 + out * kept)  # of two parts
        reckoned += 4 * out * kept  # what each has solved for
    assert reckoned <= sum(found) <= 1.1 * reckoned
    refits = len(model.model.layers)
    # of each refit: where runs wait, what tokens lack, moments, what ridges err, the ridge, whether it solves, and new weights;
    # of all: sources, how linears are called (in two), whether tokens are enough, and where runs wait at the end
    assert len(found) <= 7 * refits + 6


BITS = 1 / 32
"""Of a weight in float32, which is a bit of a mask."""
MASKS, VALUES = 2 * BITS, 2 * BITS + 0.5
"""What is gathered of each linear to hold its mask and to put it in place; with new values of half of its weights."""
