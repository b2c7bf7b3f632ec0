"""RepairConfig of a model whose blocks ranks share, in one process: it is as in memory, a block at a time."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import billhook as bh
from billhook.engine.batches import Run
from billhook.engine.comm import Comm
from billhook.engine.lazy import LazyTensors
from billhook.engine.passes import blockwise
from billhook.engine.walk import blocks_of
from billhook.pruning.repair import repair_with
from kit.families import build, tokens
from kit.losses import BUILD

MODELS = {
    "llama": lambda: build("llama", attention_bias=True, mlp_bias=True),
    "mixtral": lambda: build("mixtral", num_key_value_heads=8),
    "gpt2": lambda: BUILD["gpt2"]().eval(),
    "t5": lambda: BUILD["t5"]().eval(),
}


def both(mesh, family):
    """A model, and the same sharded."""
    plain = MODELS[family]()
    sharded = copy.deepcopy(plain)
    for part in (*blocks_of(sharded), sharded):
        fully_shard(part, mesh=mesh)
    return plain, sharded


def cut(model):
    """A plan for some heads, and channels if there are any."""
    return bh.plan(
        model, bh.importance.WeightNorm(), heads=0.5, **({} if "Mixtral" in type(model).__name__ else {"channels": 0.5})
    )


def batches(model):
    found = [{"input_ids": tokens(6, 16)} for _ in range(4)]
    return [one | {"labels": tokens(6, 8)} for one in found] if model.config.is_encoder_decoder else found


REPAIRS = {
    "compensating": bh.RepairConfig(),
    "independent": bh.RepairConfig(compensate=False),
    "matched": bh.RepairConfig(match=bh.criteria.BlockMatching(steps=3)),
}


@pytest.mark.daily("llama-*", "t5-compensating", "mixtral-independent", "mixtral-matched")
@pytest.mark.parametrize("how", REPAIRS)
@pytest.mark.parametrize("family", MODELS)
def test_as_in_memory_a_block_at_a_time(mesh, family, how):
    plain, sharded = both(mesh, family)
    plan, given, repair = cut(plain), batches(plain), REPAIRS[how]
    expected = bh.repair(plain, plan, given, repair)
    with blockwise(sharded):
        found = bh.repair(sharded, plan, given, repair, reduce=lambda tensor: tensor)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_other_parameters_that_are_given(mesh):
    plain, sharded = both(mesh, "llama")
    values = {}
    for name in (f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)):
        linear = plain.get_submodule(name)
        values |= {f"{name}.weight": linear.weight.detach() * 1.5, f"{name}.bias": linear.bias.detach()}
    asked, others = (bh.pruning.plan_units(plain, {0: [0, 1]}), batches(plain), None), LazyTensors.of(values)
    expected = repair_with(plain, *asked, new_params=others)
    with blockwise(sharded):
        found = repair_with(sharded, *asked, comm=Comm(lambda tensor: tensor), new_params=others)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_all_blocks_are_gathered_where_they_are_called_twice(mesh):
    plain, sharded = both(mesh, "llama")
    plan, given = cut(plain), batches(plain)

    def twice(model):
        return [Run(lambda one=one: (model(**one), model(**one)), {}) for one in given]

    expected = bh.repair(plain, plan, twice(plain))
    with blockwise(sharded):
        found = bh.repair(sharded, plan, twice(sharded), reduce=lambda tensor: tensor)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
