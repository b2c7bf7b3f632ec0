"""Blocks on a device one at a time, activations in files: what comes out is the same, and nothing stays behind."""

import copy

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.engine import passes
from billhook.engine.device import DeviceCopies
from billhook.engine.passes import ActivationFiles
from billhook.engine.store import store_of
from kit import prunes
from kit.families import llama, tokens
from kit.sparsity import batches_of, family

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def batches(number=3):
    return [{"input_ids": tokens()} for _ in range(number)]


@pytest.fixture
def stays(monkeypatch):
    """Who was on the device, in order."""
    order, enter = [], DeviceCopies.enter
    monkeypatch.setattr(DeviceCopies, "enter", lambda self, block: order.append(block) or enter(self, block))
    return order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_each_block_is_there_once_and_the_result_is_the_same(name, sequential, device, stays):
    model = family(name).eval()
    expected, data = copy.deepcopy(model), batches_of(model)
    prunes.prune(expected, bh.Wanda(), data, 0.5, sequential=sequential)
    homes = {name: value.data_ptr() for name, value in model.state_dict().items()} if device == "cpu" else None
    prunes.prune(model, bh.Wanda(), data, 0.5, sequential=sequential, offload=device)
    blocks = [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    inside = [block for block in stays if block in blocks]
    assert inside == blocks
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        if device == "cpu":
            assert torch.equal(value, expected.state_dict()[name]), name
            assert homes[name] == value.data_ptr()
        else:
            assert (value == expected.state_dict()[name]).float().mean() > 0.99


class OnAnother(nn.Module):
    """Refuses to compute where it is not wanted."""

    def __init__(self, device):
        super().__init__()
        self.weight, self.device = nn.Parameter(torch.ones(2)), device
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, x, *, scale):
        assert {t.device.type for t in (x, scale, self.weight, self.offset)} == {self.device}
        return {"out": x * scale * self.weight + self.offset}


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_go_there_and_outputs_come_back(device):
    blocks = nn.ModuleList([OnAnother(device), OnAnother(device)])
    tensors = [*blocks.parameters(), *blocks.buffers()]
    with store_of(blocks).on(torch.device(device), list(blocks)), torch.no_grad():
        out = blocks[0](torch.ones(2), scale=torch.ones(2))["out"]
        assert out.device.type == "cpu"
        assert (blocks[0].weight.device.type, blocks[1].weight.device.type) == (device, "cpu")
        assert all(one.device.type == "cpu" for one in tensors)
    assert all(one is other for one, other in zip([*blocks.parameters(), *blocks.buffers()], tensors, strict=True))
    assert "forward" not in vars(blocks[0])


def test_a_run_that_fails_leaves_every_block_where_it_was(monkeypatch):
    model = llama().eval()
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}

    class Failing(bh.Wanda):
        def score(self, weight, statistics=None):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        bh.prune(model, Failing(), batches(), 0.5, offload="cpu")
    assert pointers == {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_activations_on_disk_change_nothing(sequential, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "SMALL", 256)
    kept, copied = [], ActivationFiles.copy
    monkeypatch.setattr(ActivationFiles, "copy", lambda self, tensor: kept.append(copied(self, tensor)) or kept[-1])
    model = llama().eval()
    expected, data = copy.deepcopy(model), [{"input_ids": tokens(4, 16)} for _ in range(3)]
    prunes.prune(expected, bh.SparseGPT(block_size=16), data, 0.5, sequential=sequential)
    prunes.prune(model, bh.SparseGPT(block_size=16), data, 0.5, sequential=sequential, activations=str(tmp_path))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    hidden = [one for one in kept if one.shape == (4, 16, 32)]
    assert len(hidden) >= 6
    assert all(tensor.untyped_storage().filename for tensor in hidden)


@pytest.mark.parametrize(("arguments", "match"), [
    ({"offload": "gpu9"}, "offload='gpu9' is not available"),
    ({"offload": "cuda:77"}, "offload='cuda:77' is not available"),
    ({"activations": "/nowhere/at/all"}, "activations='/nowhere/at/all' must be an existing folder"),
])  # fmt: skip
def test_no_such_place(arguments, match):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        prunes.prune(model, bh.Wanda(), batches(), 0.5, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
