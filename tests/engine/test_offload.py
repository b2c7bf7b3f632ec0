"""Blocks on a device one at a time, activations in files: what comes out is the same, and nothing stays behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from greenlet import greenlet
from torch import nn

import billhook as bh
from billhook.engine import offload
from billhook.engine.memory import VARIABLE, give_back, give_back_at_once, let_go, resident
from billhook.engine.offload import Shelf, offloaded
from billhook.engine.trees import tree_leaves
from billhook.engine.walk import held
from kit.families import llama, tokens
from kit.sparsity import batches_of, family

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def batches(number=3):
    return [{"input_ids": tokens()} for _ in range(number)]


@pytest.fixture
def stays(monkeypatch):
    """Who was on the device, in order."""
    order, leave = [], offload._Stay.leave

    def watched(self):
        if self.block is not None:
            order.append(self.block)
        leave(self)

    monkeypatch.setattr(offload._Stay, "leave", watched)
    return order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("sequential", "times"), [("block", 1), ("layer", 1), ("none", 3)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_each_block_is_there_once_and_the_result_is_the_same(name, sequential, times, device, stays):
    model = family(name).eval()
    expected, data = copy.deepcopy(model), batches_of(model)
    bh.prune(expected, bh.Wanda(), data, 0.5, sequential=sequential)
    homes = {name: value.data_ptr() for name, value in model.state_dict().items()} if device == "cpu" else None
    bh.prune(model, bh.Wanda(), data, 0.5, sequential=sequential, offload=device)
    blocks = [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    inside = [block for block in stays if block in blocks]
    assert inside == blocks * times
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        if device == "cpu":
            assert torch.equal(value, expected.state_dict()[name]), name
            assert homes[name] == value.data_ptr()
        else:
            assert (value == expected.state_dict()[name]).float().mean() > 0.99


def test_encoder_and_decoder_offloaded(stays):
    model = family("t5").eval()
    expected, data = copy.deepcopy(model), batches_of(model)
    for one, device in ((expected, None), (model, "cpu")):
        bh.prune(one, bh.Wanda(), data, 0.5, offload=device)
    assert [block for block in stays if len(list(block.children()))] == [*model.encoder.block, *model.decoder.block]
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


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
    blocks = [OnAnother(device), OnAnother(device)]
    with offloaded(blocks, torch.device(device)):
        out = blocks[0](torch.ones(2), scale=torch.ones(2))["out"]
        assert out.device.type == "cpu"
        assert (blocks[0].weight.device.type, blocks[1].weight.device.type) == (device, "cpu")
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
    monkeypatch.setattr(offload, "SMALL", 256)
    kept = []
    keep = Shelf.keep
    monkeypatch.setattr(Shelf, "keep", lambda self, what: (keep(self, what), kept.append(what)))
    model = llama().eval()
    expected, data = copy.deepcopy(model), [{"input_ids": tokens(4, 16)} for _ in range(3)]
    bh.prune(expected, bh.SparseGPT(block_size=16), data, 0.5, sequential=sequential)
    bh.prune(model, bh.SparseGPT(block_size=16), data, 0.5, sequential=sequential, activations=str(tmp_path))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    if sequential != "none":
        hidden = [one for one in tree_leaves(kept) if isinstance(one, torch.Tensor) and one.shape == (4, 16, 32)]
        assert len(hidden) >= 6
        assert all(tensor.untyped_storage().filename for tensor in hidden)


def test_who_holds_a_tensor_holds_it_on_disk(tmp_path):
    own = torch.rand(64, 512)
    frame, values, pointer = {"hidden": own}, own.clone(), own.data_ptr()
    shelf, parameter = Shelf(str(tmp_path)), nn.Parameter(torch.rand(64, 512))
    small = torch.rand(3)
    before = parameter.data_ptr(), small.data_ptr()
    shelf.keep(((own, small, None, "text"), {"p": parameter}))
    assert frame["hidden"] is own
    assert own.data_ptr() != pointer
    assert torch.equal(own, values)
    assert (parameter.data_ptr(), small.data_ptr()) == before
    pointer = own.data_ptr()
    shelf.keep(own)
    assert own.data_ptr() == pointer, "what is there already stays"
    shelf.close()
    assert not list(tmp_path.iterdir())
    assert torch.equal(own, values)


def test_tensors_that_share_memory_share_a_file(tmp_path):
    shelf, base = Shelf(str(tmp_path)), torch.rand(3, 64, 512)
    queries, keys, values = (one.transpose(0, 1).detach() for one in base)  # detached, they have no base
    copies, addresses = [one.clone() for one in (queries, keys, values)], {base.untyped_storage().data_ptr()}
    del base
    shelf.keep([queries])
    assert queries.untyped_storage().data_ptr() in addresses, "others may hold the rest of its memory"
    shelf.keep({"held": (queries, keys), "more": [values, values]})
    assert all(torch.equal(one, copy) for one, copy in zip((queries, keys, values), copies, strict=True))
    assert all(one.stride() == (1, 512) for one in (queries, keys, values))
    assert len({one.untyped_storage().data_ptr() for one in (queries, keys, values)} - addresses) == 1
    keys[0, 0] = 7
    assert queries[0, 0] != 7
    shelf.close()


def test_a_view_takes_its_base_along(tmp_path):
    shelf, view = Shelf(str(tmp_path)), torch.rand(64, 512).view(512, 64).t()
    copy, base = view.clone(), view._base
    shelf.keep({"own": view})
    assert torch.equal(view, copy)
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert base.untyped_storage().filename
    shelf.close()


def test_what_a_greenlet_holds_is_what_its_own_functions_hold():
    outside, found = object(), []

    def inner(given):
        found.extend(held())
        return given

    def outer():
        own = object()
        return inner(own), own

    greenlet(outer).switch()
    assert [set(one) for one in found] == [{"given", "found"}, {"inner", "own"}]
    assert found[0]["given"] is found[1]["own"]
    assert outside not in found[1].values()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"offload": "gpu9"}, "offload='gpu9' is no device here"),
        ({"offload": "cuda:77"}, "offload='cuda:77' is no device here"),
        ({"activations": "/nowhere/at/all"}, "activations='/nowhere/at/all' must be a folder"),
    ],
)
def test_no_such_place(arguments, match):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        bh.prune(model, bh.Wanda(), batches(), 0.5, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("switched", ["1", "0", None])
def test_the_c_library_is_called_past_torch_only_if_that_is_asked_for(tmp_path, monkeypatch, switched):
    called = []
    monkeypatch.setattr(
        "ctypes.CDLL",
        lambda _: SimpleNamespace(mallopt=lambda *_: called.append("mallopt"), madvise=lambda *_: called.append("madvise")),
    )
    monkeypatch.delenv(VARIABLE, raising=False) if switched is None else monkeypatch.setenv(VARIABLE, switched)
    shelf = Shelf(str(tmp_path))
    give_back_at_once()
    let_go(shelf.zeros(2**12, dtype=torch.float32))
    shelf.close()
    assert called == (["mallopt", "madvise"] if switched == "1" else [])


def test_memory_is_given_back_where_work_is_done_on_the_cpu(monkeypatch):
    called = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(malloc_trim=called.append))
    give_back("cuda")
    assert not called
    give_back("cpu")
    assert called == [0]


@pytest.mark.skipif(resident() is None, reason="the system does not say what is resident")
def test_what_rests_in_files_is_not_resident_until_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    shelf, tensor = Shelf(str(tmp_path)), torch.ones(2**24)
    before = resident()
    shelf.keep(tensor)
    assert resident() - before < -tensor.nbytes / 2
    assert tensor.sum() == 2**24
    assert resident() - before > -tensor.nbytes / 2
    let_go(tensor)
    assert resident() - before < -tensor.nbytes / 2
    assert tensor[5] == 1
    assert tensor.sum() == 2**24
    shelf.keep({"held": [tensor]})  # by a run that waits once more
    assert resident() - before < -tensor.nbytes / 2
    zeros = shelf.zeros(2**12, 2**12, dtype=torch.float64)
    assert not zeros.any()
    let_go(zeros[1:])
    assert resident() - before < -tensor.nbytes / 2
    shelf.close()
