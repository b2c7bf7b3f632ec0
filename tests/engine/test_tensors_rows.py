"""Tensors in files, read a few rows at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook.engine import tensors
from billhook.engine.tensors import TensorFiles, add_to_file, share_parameters
from kit.families import llama

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


@pytest.mark.parametrize("largest", [10**9, 100])
def test_tensors_are_added_to_a_file(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(tensors, "LARGEST", largest)
    save_file({"bool": TENSORS["bool"], "bfloat16": TENSORS["bfloat16"]}, tmp_path / "model.safetensors")
    new = {name: TENSORS[name] for name in ("float32", "number", "whole numbers")}
    add_to_file(tmp_path, {name: tensor.to("meta") for name, tensor in new.items()}, ({name: new[name]} for name in new))
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == new.keys() | {"bool", "bfloat16"}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found.items())
    assert all(int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0 for file in files)
    index = tmp_path / "model.safetensors.index.json"
    assert (len(files) > 1) is (largest == 100) is index.is_file()
    if index.is_file():
        total = sum(tensor.nbytes for tensor in found.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_parameters_that_equal_their_files_are_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "ELEMENTS", 64)
    dense = llama()
    dense.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(dense)(dense.config)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[-1, -1] += 1
        dense.model.norm.weight = torch.nn.Parameter(dense.model.norm.weight.double())
    remaining = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert share_parameters(empty, dense, TensorFiles(str(tmp_path)), list(dense.state_dict())) == remaining
    for name, parameter in empty.named_parameters():
        assert parameter.is_meta if name in remaining else parameter.data_ptr() == dense.get_parameter(name).data_ptr()
