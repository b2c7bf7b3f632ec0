"""Ranks that each see a part of the calibration data come to one result, also where only some of them come to a linear."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import billhook as bh
from billhook.engine.sharding import full_tensor
from kit import prunes
from kit.families import llama, tokens
from kit.ranks import Ranks
from kit.sparsity import Forked, Routed


def planned(model, batches, ranks, **options):
    """The masks that ranks come to, each with every so many-th batch."""

    def plan(rank, reduce):
        own = copy.deepcopy(model)
        return prunes.prune(own, batches=batches[rank::ranks], reduce=reduce, **options, dry_run=True)

    pruned = Ranks(ranks).run(plan)
    masks = [one.masks(model) for one in pruned]
    for other, plans in zip(masks[1:], pruned[1:], strict=True):
        assert other.keys() == masks[0].keys()
        assert plans.uncalled == pruned[0].uncalled
        assert all(torch.equal(mask, other[name]) for name, mask in masks[0].items())
    return masks[0]


def agree(one, other):
    assert one.keys() == other.keys()
    return min((mask == other[name]).float().mean().item() for name, mask in one.items())


@pytest.mark.daily("wanda-*", "*-block-3")
@pytest.mark.parametrize("batches", [1, 3, 4])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"allocation": bh.criteria.OWL()}, {"criterion": bh.SparseGPT()}], ids=["wanda", "owl", "sparsegpt"]
)
def test_ranks_come_to_what_one_comes_to(sequential, batches, options):
    """Also if there are fewer batches than ranks."""
    model, options = llama(), {"criterion": bh.Wanda(), "sparsity": 0.5, "sequential": sequential, **options}
    given = [{"input_ids": tokens(4)} for _ in range(batches)]
    assert (
        agree(planned(model, given, 2, **options), prunes.prune(model, batches=given, **options, dry_run=True).masks(model))
        > 0.98
    )


def test_ranks_match_blocks_together():
    torch.manual_seed(0)
    model, given = llama(), [{"input_ids": tokens(4)} for _ in range(7)]
    options = {"criterion": bh.Wanda(), "sparsity": 0.5, "match": bh.criteria.BlockMatching()}

    def matched(rank, reduce):
        own = copy.deepcopy(model)
        prunes.prune(own, batches=given[rank::2], reduce=reduce, **options)
        return own

    one, other = Ranks(2).run(matched)
    assert all(torch.equal(mine, yours) for mine, yours in zip(one.parameters(), other.parameters(), strict=True))
    plain = copy.deepcopy(model)
    bh.prune(plain, batches=given, criterion=bh.Wanda(), sparsity=0.5)
    with torch.no_grad():
        far = [sum(float((own(**x)[0] - model(**x)[0]).norm()) for x in given) for own in (one, plain)]
    assert far[0] < far[1]
    with pytest.raises(ValueError, match=r"batches: match needs at least two batches on each rank .* got [12]"):
        Ranks(2).run(lambda rank, reduce: prunes.prune(model, batches=given[rank * 2 :: 5], reduce=reduce, **options))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(3))

    def forward(self, x, chosen):
        return sum(self.down[e](self.gate[e](x).relu() * self.up[e](x)) for e in chosen)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("routes", [[([0, 1], [2]), ([1], [0, 2]), ([0], [0])], [([0], [0]), ([1], [1])], [([0], [3])]])
@pytest.mark.filterwarnings("ignore:no calibration batch called")
def test_experts_that_not_every_rank_comes_to(sequential, routes):
    model, options = Routed(Block), {"criterion": bh.Wanda(), "sparsity": 0.5, "sequential": sequential}
    batches = [(torch.randn(2, 5, 8), route) for route in routes]
    one = prunes.prune(model, batches=batches, **options, dry_run=True)
    for ranks in (2, 3):
        assert agree(planned(model, batches, ranks, **options), one.masks(model)) > 0.98


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_linears_that_read_one_tensor_on_one_rank_only(sequential):
    model, options = Forked(), {"criterion": bh.Wanda(), "sparsity": 0.5, "sequential": sequential}
    batches = [(torch.randn(4, 16),), (torch.randn(4, 16), torch.randn(4, 16) * torch.linspace(0, 9, 16))]
    assert (
        agree(planned(model, batches, 2, **options), prunes.prune(model, batches=batches, **options, dry_run=True).masks(model))
        == 1
    )


def test_bad_inputs_of_one_rank_are_refused_by_all():
    model, batches = llama(), [{"inputs_embeds": torch.randn(2, 5, 32)} for _ in range(2)]
    batches[1]["inputs_embeds"][0, 0, 0] = float("nan")
    failed = []

    def plan(rank, reduce):
        try:
            bh.prune(copy.deepcopy(model), bh.Wanda(), [batches[rank]], 0.5, reduce=reduce, dry_run=True)
        except ValueError as error:
            failed.append(str(error))

    Ranks(2).run(plan)
    assert len(failed) == 2
    assert all("model.layers.0.self_attn.q_proj: NaN, infinite" in one for one in failed)


def test_no_data_on_any_rank_is_refused_by_all():
    with pytest.raises(ValueError, match="batches is empty: Wanda needs calibration data"):
        planned(llama(), [], 2, criterion=bh.Wanda(), sparsity=0.5)


class Counting(bh.SparseGPT):
    """SparseGPT that notes what it is asked to prune."""

    def prune(self, weight, statistics=None, sparsity=None, pattern="unstructured"):
        self.seen.append(tuple(weight.shape))
        return super().prune(weight, statistics, sparsity, pattern)

    @property
    def seen(self):
        return vars(self).setdefault("asked", [])


WIDE = 160
"""What a `down_proj` reads that takes longer to prune than all other linears of its block."""


@pytest.mark.parametrize("width", [48, WIDE])
@pytest.mark.parametrize("criterion", [bh.SparseGPT(), bh.criteria.Refit()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_divide_linears_whose_weights_are_solved_for(criterion, dtype, width):
    model, batches = llama(intermediate_size=width).to(dtype), [{"input_ids": tokens(4)} for _ in range(4)]

    def prune(rank, reduce):
        own = copy.deepcopy(model)
        bh.prune(own, criterion, [] if rank else batches, sparsity=0.5, reduce=reduce)
        return own.state_dict()

    whole = prune(0, None)
    for state in (*Ranks(2).run(prune), *Ranks(2).run(lambda rank, reduce: prune(rank, lambda tensor: reduce(tensor)))):
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


def test_each_rank_solves_for_its_share():
    model, batches, criteria = llama(), [{"input_ids": tokens(4)} for _ in range(2)], [Counting() for _ in range(2)]
    Ranks(2).run(lambda rank, reduce: bh.prune(copy.deepcopy(model), criteria[rank], batches[rank:], sparsity=0.5, reduce=reduce))
    shapes = [tuple(linear.weight.shape) for linear in model.model.modules() if isinstance(linear, nn.Linear)]
    assert sorted(criteria[0].seen + criteria[1].seen) == sorted(shapes)
    cost = [sum(width**2 * (rows + width) for rows, width in one.seen) for one in criteria]
    assert max(cost) < 0.7 * sum(cost)


def test_ranks_of_which_one_cannot_solve_for_a_linear_all_stop():
    class Failing(bh.SparseGPT):
        def prune(self, weight, statistics=None, sparsity=None, pattern="unstructured"):
            raise ValueError("no memory is left")

    given = [Failing(), bh.SparseGPT()]
    with pytest.raises(ValueError, match=r"model\.layers\.0\..*: no memory is left"):
        Ranks(2).run(lambda rank, reduce: bh.prune(llama(), given[rank], [{"input_ids": tokens(4)}], sparsity=0.5, reduce=reduce))


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.criteria.Refit()], ids=str)
def test_ranks_come_to_one_mask_of_convolutions(criterion):
    """Each group of a depthwise convolution has sums of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 1))
    given = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    options = {"criterion": criterion, "sparsity": 0.5, "convolutions": "all"}
    expected = prunes.prune(model, batches=given, **options, dry_run=True).masks(model)
    assert agree(planned(model, given, 2, **options), expected) == 1


def test_a_reduce_that_returns_nothing_is_refused():
    model, batches = llama(), [{"input_ids": tokens(2, 32)} for _ in range(2)]
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (
        lambda **given: prunes.prune(model, bh.Wanda(), batches, 0.5, **given),
        lambda **given: bh.plan(model, bh.OutputNorm(), batches, channels=0.25, **given),
        lambda **given: bh.score(model, bh.find_units(model, "head"), bh.OutputNorm(), batches, **given),
        lambda **given: bh.repair(model, plan, batches, **given),
    ):
        with pytest.raises(ValueError, match="reduce must return the summed tensor, but returned None"):
            call(reduce=lambda tensor: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tensor_parallelism_is_refused_where_data_is_needed(mesh):
    model = llama()
    parallelize_module(model, mesh, {"model.layers.*.mlp.down_proj": RowwiseParallel()})
    before = {name: full_tensor(value).clone() for name, value in model.state_dict().items()}
    for options in ({"criterion": bh.Wanda()}, {"criterion": bh.Magnitude(), "match": bh.criteria.BlockMatching()}):
        with pytest.raises(ValueError, match="^model: tensor parallelism splits its weights"):
            prunes.prune(model, batches=[{"input_ids": tokens(4)}], sparsity=0.5, **options)
    assert all(torch.equal(full_tensor(value), before[name]) for name, value in model.state_dict().items())
    assert bh.prune(model, bh.Magnitude(), sparsity=0.5).sparsity == pytest.approx(0.5, abs=0.01)
