"""FSDP2 in one process: how much memory events take beside what the fit has; that of two is in test_model_parallel.py."""

import pytest
import torch

from kit.beside import EVENTS, LAYERS, ZEROS, beside
from kit.sharding import sharding

pytestmark = pytest.mark.slow


@pytest.mark.daily("KV heads, with data", "zeros, matched")
@pytest.mark.parametrize("name", EVENTS)
def test_two_blocks_at_most_are_there_beside_what_the_fit_has(tmp_path, alone, name):
    found = beside(tmp_path, name, alone)
    assert found.most <= found.allowed, (found, found.most / found.block)
    assert "not repaired" not in found.what


@pytest.mark.nightly
@pytest.mark.parametrize("name", ZEROS)
def test_of_more_blocks_there_are_shares_and_no_more(tmp_path, name):
    found = []
    for layers in (LAYERS, 2 * LAYERS):
        found.append(beside(tmp_path, name, sharding(1), layers=layers))
        torch.distributed.destroy_process_group()
    few, many = found
    assert many.most <= many.allowed, (many, many.most / many.block)
    assert many.most - few.most <= many.shards - few.shards
