"""What a linear becomes where weights are sharded: each rank keeps its share, and all of them make the whole again."""

import copy
import json

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import billhook as bh
from billhook.engine.sharding import full_tensor
from billhook.model.plan import ModelPlan, apply
from kit.sparsity import batches_of, family

CRITERIA = [bh.Wanda(), bh.Magnitude(compares="global"), bh.criteria.Refit(), bh.SparseGPT(block_size=16)]


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
    assert str(plan).partition("\n")[2] == str(of_whole).partition("\n")[2]
    assert json.dumps(plan.to_json()["pruned"]) == json.dumps(of_whole.to_json()["pruned"])
    masks = of_whole.masks(model)
    assert all(torch.equal(full_tensor(mask), masks[own]) for own, mask in plan.masks(given).items())
    other = sharded(model, mesh)
    apply(given, plan)
    apply(other, ModelPlan.from_json(plan.to_json(), other))
    apply(model, of_whole)
    for one in (given, other):
        assert all(torch.equal(full_tensor(own), ours) for own, ours in zip(one.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.SparseGPT(block_size=4)], ids=str)
def test_a_plan_is_carried_out_however_weights_lie(mesh, criterion):
    model, batches = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), [torch.randn(9, 8)]
    given = copy.deepcopy(model)
    fully_shard(given, mesh=mesh)
    plan = bh.prune(given, criterion, batches, sparsity=0.5, dry_run=True)
    given[1].weight = torch.nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Replicate()]))
    expected = copy.deepcopy(model)
    bh.prune(expected, criterion, batches, sparsity=0.5)
    for one in (model, given):
        apply(one, plan)
        assert all(torch.equal(full_tensor(own), ours) for own, ours in zip(one.parameters(), expected.parameters(), strict=True))
