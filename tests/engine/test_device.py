"""On a device that computes with its own tensors alone, blocks in memory or in files give what they give on the CPU."""

import pytest

from kit.on_device import WORKS
from kit.ranks import asked_for
from kit.standin import said_by


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What is wrong with each work, by its name: all in one process of their own, as a device cannot be taken away again."""
    return said_by("kit.on_device", tmp_path_factory.mktemp("models"), *asked_for(request))


def check(name, found):
    wrong, ended = found
    assert name in wrong, ended
    assert wrong[name] == "", wrong[name]


@pytest.mark.daily(
    "memory: Wanda", "memory: experts", "memory, sent ahead: SparseGPT", "memory, sent ahead: match", "memory: changes"
)
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name.startswith("memory")])
def test_a_model_in_memory_on_a_device(name, found):
    check(name, found)


@pytest.mark.daily("files: Wanda", "files: repair", "files: hidden dimensions", "files, read ahead: match")
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name.startswith("files")])
def test_a_model_in_files_on_a_device(name, found):
    check(name, found)
