"""KV heads of a model whose blocks ranks share, in one process: what they become is as in memory, and lies in shards."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import billhook as bh
from billhook.engine.comm import Comm
from billhook.engine.lazy import LazyTensors
from billhook.engine.passes import blockwise
from billhook.engine.shards import ShardStore
from billhook.engine.walk import blocks_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.convert import equal_heads
from billhook.kv_heads.methods import method_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.surgery import changed_names
from kit.families import llama, tokens
from kit.kv_zoo import build

MODELS = {
    "llama": lambda: llama(attention_bias=True, mlp_bias=True),
    "bert": lambda: build("bert"),
    "albert": lambda: build("albert", num_hidden_groups=2, num_hidden_layers=4),  # calls each block twice
}
METHODS = {"svd": "svd", "aligned": "aligned", "auto": "auto", "similar": bh.kv_methods.SVD("similar")}


def both(mesh, family="llama"):
    """A model, and the same sharded, how its heads are grouped, and batches."""
    plain = MODELS[family]()
    sharded = copy.deepcopy(plain)
    for part in (*blocks_of(sharded), sharded):
        fully_shard(part, mesh=mesh)
    plan = plan_kv_heads(plain, 2)
    return plain, sharded, dict.fromkeys(plan.layers, 2), [({"input_ids": tokens(6, 16)}, None) for _ in range(4)]


@pytest.mark.daily("llama-svd-*", "llama-auto-repair", "bert-aligned-repair")
@pytest.mark.parametrize("repair", [None, bh.RepairConfig()], ids=["no repair", "repair"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_heads_are_made_ready_as_in_memory(mesh, family, method, repair, monkeypatch):
    plain, sharded, groups, batches = both(mesh, family)
    asked = method_of(METHODS[method]), batches, repair
    expected = equal_heads(Attentions(plain, groups), *asked)
    monkeypatch.setattr(ShardStore, "all_loaded", None)
    with blockwise(sharded):
        found = equal_heads(Attentions(sharded, groups, Comm(lambda tensor: tensor)), *asked)
        assert changed_names(sharded, found.values) == changed_names(plain, expected.values)
    assert (found.how, found.rope) == (expected.how, expected.rope)
    assert found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        torch.testing.assert_close(found.values[name], value, msg=name)


def test_blocks_that_are_called_twice_are_made_ready_as_in_memory(mesh):
    plain, sharded, groups, batches = both(mesh, "albert")
    asked = method_of("auto"), batches, None
    expected = equal_heads(Attentions(plain, groups), *asked)
    with blockwise(sharded):
        found = equal_heads(Attentions(sharded, groups, Comm(lambda tensor: tensor)), *asked)
    assert (found.how, found.rope) == (expected.how, expected.rope)
    for name, value in expected.values.items():
        torch.testing.assert_close(found.values[name], value, msg=name)


def test_moments_of_an_attention_go_with_its_block(mesh, alive_sums):
    _, sharded, groups, batches = both(mesh)
    with blockwise(sharded):
        equal_heads(Attentions(sharded, groups, Comm(lambda tensor: tensor)), bh.kv_methods.SVD(), batches, None)
    assert alive_sums == [1] * 2 * len(groups)  # what frequencies keep, then the heads


def test_some_are_left_out_and_nothing_is_read():
    def fail():
        raise AssertionError("it is read")

    left = LazyTensors({"a": fail, "b": fail}, "key").without({"a"})
    assert (list(left), left.key) == (["b"], "key")
