"""What a linear becomes where weights are sharded: each rank keeps its share, and all of them make the whole again."""

import copy
import json

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import billhook as bh
from billhook.engine.sharding import whole
from billhook.model.plan import Plan, apply
from billhook.sparsity.pruned import Pruned, Share
from kit.sparsity import batches_of, family

CRITERIA = [bh.Wanda(), bh.Magnitude(compares="global"), bh.Refit(), bh.SparseGPT(block_size=16)]


def sharded(model, mesh):
    own = copy.deepcopy(model)
    for part in [*next(one for one in own.modules() if isinstance(one, torch.nn.ModuleList)), own]:
        fully_shard(part, mesh=mesh)
    return own


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plan_of_shares_is_that_of_the_whole_model(mesh, name, criterion):
    model = family(name).eval()
    given, batches = sharded(model, mesh), batches_of(model)
    plan, of_whole = (
        bh.prune(one, criterion, batches, 0.5, reduce=lambda tensor: tensor, dry_run=True) for one in (given, model)
    )
    assert all(isinstance(one, Share) for one in plan.pruned.values())
    assert str(plan).partition("\n")[2] == str(of_whole).partition("\n")[2]
    assert json.dumps(plan.to_json()["pruned"]) == json.dumps(of_whole.to_json()["pruned"])
    masks = of_whole.masks(model)
    assert all(torch.equal(whole(mask), masks[own]) for own, mask in plan.masks(given).items())
    other = sharded(model, mesh)
    apply(given, plan)
    apply(other, Plan.from_json(plan.to_json(), other))
    apply(model, of_whole)
    for one in (given, other):
        assert all(torch.equal(whole(own), ours) for own, ours in zip(one.parameters(), model.parameters(), strict=True))


def test_a_share_tells_by_its_hash_what_the_whole_is(mesh):
    old = distribute_tensor(torch.randn(6, 5), mesh)
    keep = torch.rand(6, 5) < 0.5
    both = [Pruned.of(old.full_tensor(), new, keep) for new in (old.full_tensor() * keep, old.full_tensor() * keep * 2)]
    same, twice = (one.share(old) for one in both)
    assert same.decided == both[0].share(old).decided != twice.decided
    assert same.values is None
    assert both[1].share(distribute_tensor(torch.randn(6, 5), mesh)).decided == twice.decided
    assert torch.equal(twice.whole().values, both[1].values)


def test_weights_that_lie_otherwise_are_refused_before_anything_changes(mesh):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    given = copy.deepcopy(model)
    fully_shard(given, mesh=mesh)
    plan = bh.prune(given, bh.Magnitude(), sparsity=0.5, dry_run=True)
    given[1].weight = torch.nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Replicate()]))
    for one in (model, given):
        before = [whole(own).clone() for own in one.parameters()]
        with pytest.raises(
            ValueError, match=r"plan: it was made where weights lay on ranks in another way, .*of \[8, 8\]: plan anew"
        ):
            apply(one, plan)
        assert all(torch.equal(whole(own), old) for own, old in zip(one.parameters(), before, strict=True))
