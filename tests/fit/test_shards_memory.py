"""FSDP2 in one process: how much memory events take beside what the fit has; that of two is in test_shards_two_ranks.py."""

import pytest

from kit.beside import EVENTS, beside

pytestmark = pytest.mark.slow


@pytest.mark.daily("zeros, matched")
@pytest.mark.parametrize("name", EVENTS)
def test_two_blocks_at_most_are_there_beside_what_the_fit_has(tmp_path, alone, name):
    found = beside(tmp_path, name, alone)
    assert found.most <= found.allowed, (found, found.most / found.block)
    assert "not repaired" not in found.what
