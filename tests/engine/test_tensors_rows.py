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
    names, (first, last) = list(dense.state_dict()), (layer.self_attn for layer in dense.model.layers)
    with torch.no_grad():
        first.q_proj.weight[-1, -1] += 1
        first.k_proj.weight = torch.nn.Parameter(first.k_proj.weight.t().contiguous().t())
        first.v_proj.weight = torch.nn.Parameter(first.v_proj.weight[:-1])
        last.q_proj.weight = torch.nn.Parameter(last.q_proj.weight.double())
        last.k_proj.weight.untyped_storage().resize_(0)
        last.v_proj = torch.nn.Identity()
        for model in (dense, empty):
            model.model.layers[1].self_attn.o_proj.half()  # of which the file holds float32
        empty.model.norm.to_empty(device="cpu")
    remaining = [
        name for name in names if any(part in name for part in ("q_proj", "k_proj", "v_proj", "1.self_attn.o", "model.norm"))
    ]
    assert share_parameters(empty, dense, TensorFiles(str(tmp_path)), names) == remaining
    for name, parameter in empty.named_parameters():
        assert name in remaining or parameter.data_ptr() == dense.get_parameter(name).data_ptr()
