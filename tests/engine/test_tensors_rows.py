"""Tensors in files, read a few rows at a time."""

import os

import pytest
import torch
from safetensors.torch import save_file

import billhook as bh
from billhook.engine.tensors import TensorFiles

TENSORS = {
    "bfloat16": torch.randn(7, 5).to(torch.bfloat16),
    "float32": torch.randn(9, 2, 3),
    "bool": torch.randn(11) > 0,
    "number": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "whole numbers": torch.arange(12).view(4, 3),
}


@pytest.fixture
def files(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return TensorFiles(str(tmp_path))


@pytest.mark.parametrize("elements", [1, 10, 1000])
@pytest.mark.parametrize("name", TENSORS)
def test_rows_are_those_of_the_tensor(files, name, elements):
    rows, whole = list(files.rows(name, elements)), TENSORS[name]
    assert torch.equal(torch.cat(rows) if whole.dim() else rows[0], whole)
    assert all(one.dtype == whole.dtype for one in rows)
    assert len(rows) == 1 or all(one.numel() <= max(elements, whole[0].numel()) for one in rows)


def test_no_more_is_read_than_the_rows(files):
    first = next(iter(files.rows("float32", 6)))
    assert first.untyped_storage().nbytes() == 6 * 4


def test_rows_under_another_name(files):
    files.rename({"float32": "then"}, ["bool"])
    assert torch.equal(torch.cat(list(files.rows("then", 6))), TENSORS["float32"])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no way to be told")
def test_what_is_read_ahead_are_the_bytes_of_the_tensors(files, tmp_path, monkeypatch):
    asked, content = [], (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, how: asked.append((content[start : start + length], how)))
    files.rename({"float32": "then"}, [])
    files.read_ahead(["then", "none", "whole numbers"])
    expected = [TENSORS[name].numpy().tobytes() for name in ("float32", "whole numbers")]
    assert asked == [(one, os.POSIX_FADV_WILLNEED) for one in expected]


def test_the_next_block_is_read_ahead_while_one_computes(monkeypatch):
    model, ahead = bh.stream("tiny"), []
    monkeypatch.setattr(
        TensorFiles, "read_ahead", lambda _, names: ahead.append({name.rpartition("layers.")[2][0] for name in names})
    )
    with torch.no_grad():
        model(torch.arange(8)[None])
    count = model.config.num_hidden_layers
    assert ahead[-1] == {"0"}
    assert ahead[:-1] == [{str(number)} for number in range(count - len(ahead) + 1, count)]


def test_a_file_that_ends_early(tmp_path):
    save_file({"long": torch.zeros(2**10, 2**10)}, tmp_path / "model.safetensors")
    rows = TensorFiles(str(tmp_path)).rows("long", 2**10)
    next(rows)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2**21)
    with pytest.raises(ValueError, match="long ends before its last row"):
        list(rows)
