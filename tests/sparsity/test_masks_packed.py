"""Masks that are packed: 8 weights a byte, made where the weights lie, so that bits are all that is copied to the host."""

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.model.layers import prunable
from billhook.sparsity import masks, weight_plan
from billhook.sparsity.enforcement import EnforcedMasks
from billhook.sparsity.weight_plan import count_kept, pack_mask, unpack_mask
from kit.families import llama
from kit.syncs import Syncs

CRITERIA = {  # with how often a linear asks the device at most
    "wanda": (bh.Wanda(), "unstructured", 8),
    "pairs": (bh.Wanda(), "2:4", 8),
    "magnitude": (bh.Magnitude(compares="row"), "unstructured", 8),
    "refit": (bh.criteria.Refit(), "unstructured", 10),
    "sparsegpt": (bh.SparseGPT(), "unstructured", 14),
    "alps": (bh.criteria.ALPS(steps=32), "unstructured", 22),  # its mask is compared in each third step
}


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """As on the CPU, and as on an accelerator, which packs and selects by itself."""
    if request.param == "device":
        monkeypatch.setattr(weight_plan, "HOST", "none")
        monkeypatch.setattr(masks, "HOST", "none")
    return request.param


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (4, 4), (16, 8), (2, 3, 3, 7)])
def test_bits_are_those_of_numpy(where, shape):
    mask = torch.rand(shape) < 0.5
    for one in (mask, mask.transpose(0, -1)):
        found = pack_mask(one)
        np.testing.assert_array_equal(found, np.packbits(one.numpy()))
        assert count_kept(found) == one.sum()
        np.testing.assert_array_equal(unpack_mask(found, one.numel(), one.device), one.reshape(-1))
        assert np.array_equal(unpack_mask(found, one.numel() // 2, one.device), one.reshape(-1)[: one.numel() // 2])


@pytest.mark.parametrize("name", CRITERIA)
def test_a_linear_takes_few_syncs_and_only_bits_are_copied(where, name):
    model, batch = llama(intermediate_size=32), {"input_ids": torch.randint(3, 60, (8, 12))}
    criterion, pattern, most = CRITERIA[name]
    linears = prunable(model)
    with Syncs() as syncs:
        bh.prune(model, criterion, [batch], None if ":" in pattern else 0.5, pattern)
    assert syncs.total <= most * len(linears)
    if where == "device" and not criterion.updates:
        assert 0 < syncs.copied <= sum(linear.weight.numel() for linear in linears.values()) // 8 + 64


def test_masks_are_packed_once_however_often_they_are_saved(where):
    model = llama()
    held, keeps = EnforcedMasks(), {name: torch.rand(linear.weight.shape) < 0.5 for name, linear in prunable(model).items()}
    held.attach(model, [])
    held.hold(keeps)
    first = held.state_dict()
    with Syncs() as syncs:
        again = held.state_dict()
    assert all(again[name]["bits"] is first[name]["bits"] for name in keeps)
    assert not syncs.places
    held.hold({name: ~keep for name, keep in keeps.items()})
    other = EnforcedMasks()
    other.load_state_dict(held.state_dict())
    assert all(torch.equal(other.masks[name], ~keep) for name, keep in keeps.items())
