"""What is computed on a device without float64, as Apple's and Intel's Arc are, is what the CPU computes."""

import pytest
import torch

from billhook.linalg import float64_device, widest_float
from kit.standin import said_by
from kit.without_float64 import WORKS


def test_a_device_with_float64_keeps_it():
    assert float64_device("cpu") == torch.device("cpu")
    assert widest_float(torch.device("meta")) == torch.float64


@pytest.fixture(scope="module")
def found():
    """What is wrong with each work, by its name: all in one process of their own, as a device cannot be taken away again."""
    return said_by("kit.without_float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_without_float64_it_is_as_on_the_cpu(name, found):
    wrong, ended = found
    assert name in wrong, ended
    assert wrong[name] == "", wrong[name]
