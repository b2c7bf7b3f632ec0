"""Masks that are packed: 8 weights a byte, on the host as on a device."""

import numpy as np
import pytest
import torch

from billhook.sparsity import masks, weight_plan
from billhook.sparsity.weight_plan import count_kept, pack_mask, unpack_mask


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
