"""Tensors in files, read a few rows at a time."""

import pytest
import torch
from safetensors.torch import save_file

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


def test_rows_under_another_name(files):
    files.rename({"float32": "then"}, ["bool"])
    assert torch.equal(torch.cat(list(files.rows("then", 6))), TENSORS["float32"])


def test_a_file_that_ends_early(tmp_path):
    save_file({"long": torch.zeros(2**10, 2**10)}, tmp_path / "model.safetensors")
    rows = TensorFiles(str(tmp_path)).rows("long", 2**10)
    next(rows)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2**21)
    with pytest.raises(ValueError, match="long ends before its last row"):
        list(rows)
