"""A sharded model of which one block at a time is whole, in one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import billhook as bh
from billhook.engine.comm import Comm
from billhook.engine.passes import blockwise
from billhook.engine.store import store_of
from billhook.importance.baselines import RandomUnits
from billhook.importance.score import Importance, Sums
from kit.families import llama, tokens


def both(mesh):
    """A model, and the same sharded."""
    plain, sharded = llama(), llama()
    sharded.load_state_dict(plain.state_dict())
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh)
    return plain, sharded


class Looks(Importance):
    """Looks into weights that it has not had brought."""

    def sums(self, model, units, per, runs):
        sums = Sums.zero(units, per)
        for name, one in units.items():
            sums.add(name, torch.ones(one.count(per)) * model.get_submodule(one.readers[0]).weight.sum(), 1)
        return sums


SCORES = {
    "BlockInfluence": (bh.importance.BlockInfluence(), "block"),
    "ActivationNorm": (bh.importance.ActivationNorm(), "head"),
    "OutputNorm": (bh.OutputNorm(), "channel"),
    "OBS": (bh.OBS(), "channel"),
    "WeightNorm": (bh.importance.WeightNorm(), "head"),
    "RandomUnits": (RandomUnits(), "head"),
    "Ablation": (bh.importance.Ablation(), "block"),
    "GateGradient": (bh.importance.GateGradient(), "head"),
    "Taylor": (bh.Taylor(order="mixed"), "residual"),
    "one's own": (Looks(), "head"),
}


@pytest.mark.parametrize("name", SCORES)
def test_units_are_scored_as_in_memory(mesh, name):
    plain, sharded = both(mesh)
    importance, kind = SCORES[name]
    units, batches = bh.find_units(plain, kind), [{"input_ids": own, "labels": own} for own in (tokens(), tokens())]
    expected = bh.score(plain, units, importance, batches)
    with blockwise(sharded):
        found = bh.score(sharded, units, importance, batches, reduce=lambda tensor: tensor)
    assert all(torch.equal(found[place], own) for place, own in expected.items())
    assert all(isinstance(own, DTensor) for own in sharded.parameters())


def test_one_block_is_there(mesh):
    _, sharded = both(mesh)
    first, last = sharded.model.layers
    with blockwise(sharded):
        for block, other in ((first, last), (last, first)):
            store_of(sharded).load(block.mlp.up_proj)
            assert all(size(own) for own in block.parameters())
            assert not any(size(own) for own in other.parameters())
            held = [store_of(sharded).holder(one.mlp.up_proj.weight) for one in (block, other)]
            assert held[0] is block.mlp.up_proj.weight
            assert isinstance(held[1], DTensor)
        assert size(sharded.lm_head.weight)


def size(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().size()


def test_ranks_take_part_in_what_others_bring_until_all_have_ended(mesh):
    _, sharded = both(mesh)
    first, last = sharded.model.layers
    others = iter([[0, 1, 1], [0, 1, 1], [0, 0, 0]])  # another rank brings the last block twice
    asked = []

    def add(tensor):
        asked.append(tensor.tolist())
        return tensor + torch.tensor(next(others))

    with blockwise(sharded):
        store = store_of(sharded)
        with store.independently(Comm(add, size=2)):
            store.load(first)
            assert size(first.mlp.up_proj.weight)
            assert not size(last.mlp.up_proj.weight)
        assert store_of(sharded) is store
    assert asked == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
