import pytest
import torch

from kit.sharding import sharding


@pytest.fixture
def alone():
    """A strategy that shards over one process."""
    yield sharding(1)
    torch.distributed.destroy_process_group()
