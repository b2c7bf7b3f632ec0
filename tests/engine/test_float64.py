"""What is computed on a device without float64, as Apple's and Intel's Arc are, is what the CPU computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from billhook.linalg import float64_device, widest_float
from kit.without_float64 import WORKS


def test_a_device_with_float64_keeps_it():
    assert float64_device("cpu") == torch.device("cpu")
    assert widest_float(torch.device("meta")) == torch.float64


@pytest.fixture(scope="module")
def found():
    """What is wrong with each work, by its name: all in one process of their own, as a device cannot be taken away again."""
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "kit.without_float64"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return dict(json.loads(line) for line in done.stdout.splitlines()), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_without_float64_it_is_as_on_the_cpu(name, found):
    wrong, ended = found
    assert name in wrong, ended
    assert wrong[name] == "", wrong[name]
