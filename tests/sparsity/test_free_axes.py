"""Which axes may be put in another order, and in how many parts."""

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.model.layers import prunable
from billhook.sparsity.channel_order import find_free_axes
from kit.families import build, llama
from kit.sparsity import family


def free_of(model, m=4):
    return find_free_axes(model, bh.trace(model), prunable(model), m)


def shapes(free):
    return {(one.group.kind, one.group.where): one.sets.shape[0] for one in free}


def test_a_llama_has_three_kinds_and_an_order_for_each_kv_head():
    free, why = free_of(llama(head_dim=8))
    assert shapes(free) == {
        ("residual", ""): 1,
        **{("value", f"model.layers.{layer}.self_attn"): 4 for layer in (0, 1)},
        **{("channel", f"model.layers.{layer}.mlp"): 1 for layer in (0, 1)},
    }
    assert why == {}
    value = next(one for one in free if one.group.kind == "value")
    ((name, positions),) = value.readers.items()
    assert name == "model.layers.0.self_attn.o_proj"
    expected = np.arange(64).reshape(4, 2, 8)  # KV heads, query heads of each, dimensions
    assert np.array_equal(positions, expected.transpose(0, 2, 1))


def test_the_stream_is_read_by_all_but_those_that_write_it():
    free, _ = free_of(llama())
    readers = next(one.readers for one in free if one.group.kind == "residual")
    assert {name.rpartition(".")[2] for name in readers} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert len(readers) == 10


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bloom", "gpt_neox", "vit"])
def test_every_set_of_every_member_has_each_unit(name):
    free, _ = free_of(family(name))
    assert {one.group.kind for one in free} >= {"residual", "channel"}
    for one in free:
        for member in one.group.members:
            positions = one.positions(member.axis)
            assert positions.shape[:2] == (len(one.sets), one.group.size)
            assert len(np.unique(positions)) == positions.size


def test_dimensions_that_positions_rotate_stay():
    free, why = free_of(family("falcon"))  # whose values are turned by the code of keys
    assert not any(one.group.kind in ("value", "rotary") for one in free)
    assert any(name.startswith("rotary") and "frequency" in reason for name, reason in why.items())


def test_groups_that_hold_parts_of_two_heads_stay():
    free, why = free_of(llama(head_dim=6))
    assert {one.group.kind for one in free} == {"residual", "channel"}
    assert {reason for name, reason in why.items() if name.startswith("value")} == {"they share groups of 4 with other units"}


def test_what_a_parameter_outside_may_read_stays():
    class Probed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.probe = llama(), torch.nn.Linear(32, 2)

    module = Probed()
    _, why = find_free_axes(module.model, bh.trace(module), prunable(module.model), 4)
    assert list(why) == ["residual in the model"]
    assert "probe" in why["residual in the model"]


class Scaled(torch.nn.Module):
    def __init__(self, norm, persistent):
        super().__init__()
        self.norm = norm
        self.register_buffer("scale", torch.rand(32), persistent=persistent)

    def forward(self, x):
        return self.norm(x) * self.scale


@pytest.mark.parametrize("persistent", [True, False])
def test_what_no_checkpoint_holds_stays(persistent):
    model = llama()
    model.model.norm = Scaled(model.model.norm, persistent)
    free, why = free_of(model)
    assert ("residual" in {one.group.kind for one in free}) == persistent
    reason = "the buffer model.norm.scale contains them and is not saved in checkpoints"
    assert why == ({} if persistent else {"residual in the model": reason})


def test_experts_in_one_tensor_are_read_by_no_linear():
    free, _ = free_of(build("mixtral"))
    assert {one.group.kind for one in free} == {"residual", "value"}
