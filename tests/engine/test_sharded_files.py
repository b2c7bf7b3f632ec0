"""Sharded checkpoints as data: what is listed is read, and nothing that a folder brings is run."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from billhook.engine.sharded_files import _Plain, is_sharded_checkpoint, read_sharded

WEIGHTS = {"model.one": torch.arange(6.0).view(2, 3), "model.two": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    state = {"state_dict": WEIGHTS, "optimizer_0": {"state": {"model.one": {"step": torch.tensor(3.0)}}}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"global_step": 3}, tmp_path / "meta.pt")
    return tmp_path


def test_weights_are_read_without_what_optimizers_keep(folder):
    found = read_sharded(folder)
    assert is_sharded_checkpoint(folder)
    assert found.keys() == {"global_step", "state_dict"}
    assert found["state_dict"].keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(found["state_dict"][name], value)
        assert found["state_dict"][name].dtype == value.dtype


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


class Imported:
    def __reduce__(self):
        return (__import__, ("os",))


@pytest.mark.parametrize("hostile", [Runs(), Imported(), [1, 2], b"none"], ids=["a call", "an import", "a list", "bytes"])
def test_a_list_that_torch_did_not_write_is_refused(folder, monkeypatch, hostile):
    monkeypatch.chdir(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match="has no valid metadata of torch.distributed.checkpoint"):
        read_sharded(folder)
    assert not (folder / "ran").exists()


def changed(folder, change):
    listed = pickle.loads((folder / ".metadata").read_bytes())
    change(listed)
    (folder / ".metadata").write_bytes(pickle.dumps(listed))


def elsewhere(listed):
    for one in listed.storage_data.values():
        one.relative_path = "../other.distcp"


def larger(listed):
    listed.state_dict_metadata["state_dict.model.one"].size = torch.Size([10**9, 10**3])


def no_tensor(listed):
    listed.state_dict_metadata["state_dict.model.one"] = BytesStorageMetadata()


@pytest.mark.parametrize(("change", "match"), [
    (elsewhere, "names a file outside of the folder: ../other.distcp"),
    (larger, "lists 4000000000008 bytes of weights, but its files have"),
    (no_tensor, "state_dict.model.one in its metadata is not a tensor"),
])  # fmt: skip
def test_a_list_of_what_is_not_there_is_refused(folder, change, match):
    changed(folder, change)
    with pytest.raises(ValueError, match=match):
        read_sharded(folder)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_as_python_before_3_13_and_since_names_them(module):
    assert _Plain(io.BytesIO(f"c{module}\nPosixPath\n(Vshards\ntR.".encode())).load() == Path("shards")


def test_a_torch_that_lists_otherwise_is_refused_by_its_version(folder, monkeypatch):
    monkeypatch.delattr("torch.distributed.checkpoint.filesystem._StorageInfo")
    told = rf"torch {torch.__version__.partition('+')[0]}.* lacks torch.distributed.checkpoint.filesystem._StorageInfo, which"
    with pytest.raises(RuntimeError, match=told):
        read_sharded(folder)
