"""Checkpoints are loaded and exported a tensor at a time: no process holds the model twice, or writes it elsewhere."""

import gc
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed import checkpoint as dcp

import billhook as bh
from billhook.checkpoints.export import export
from billhook.model.checkpoint_shape import save_shape
from kit.families import llama, tokens
from kit.fits import same
from kit.held import Held


class Plain(pl.LightningModule):
    """A user's own module, which renames what it loads."""

    def __init__(self, width=64):
        super().__init__()
        self.save_hyperparameters()
        self.model = llama(hidden_size=width, vocab_size=2048)
        self.seen = None

    def on_load_checkpoint(self, checkpoint):
        self.seen = {name: value.sum() for name, value in checkpoint["state_dict"].items()}
        self.others = sorted(checkpoint.keys() & {"optimizer_states", "loops"})


def described(lit):
    """All but the tensors of a checkpoint, whose model has fewer KV heads than its class makes."""
    bh.convert_kv_heads(lit.model, 2)
    checkpoint = {"hyper_parameters": dict(lit.hparams), "global_step": 3, "pytorch-lightning_version": pl.__version__}
    save_shape(lit, checkpoint)
    return checkpoint


def sharded(lit, folder):
    """Writes a folder of shards as Lightning does."""
    checkpoint = described(lit)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"state_dict": lit.state_dict()}, checkpoint_id=folder, no_dist=True)
    torch.save(checkpoint, folder / "meta.pt")
    gc.collect()  # the dense weights
    return lit


def in_a_file(lit, path):
    """Writes all into one file, with what optimizers keep, as Lightning does."""
    checkpoint, state = described(lit), lit.state_dict()
    moments = {number: {"exp_avg": one, "exp_avg_sq": one.clone()} for number, one in enumerate(state.values())}
    torch.save(checkpoint | {"state_dict": state, "optimizer_states": [{"state": moments}], "loops": {}}, path)
    gc.collect()
    return lit


WRITE = {"full": in_a_file, "sharded": lambda lit, path: path.mkdir() or sharded(lit, path)}


def size(state):
    return sum(value.nbytes for value in {value.data_ptr(): value for value in state.values()}.values())


@pytest.mark.daily("sharded")
@pytest.mark.parametrize("how", WRITE)
def test_a_hook_of_a_module_sees_the_values(tmp_path, how):
    lit = WRITE[how](Plain(), tmp_path / "a.ckpt")
    found = bh.training.load_from_checkpoint(Plain, tmp_path / "a.ckpt")
    assert found.others == (["loops", "optimizer_states"] if how == "full" else [])
    assert all(torch.equal(found.seen[name], value.sum()) for name, value in lit.state_dict().items())
    assert type(next(iter(found.seen.values()))) is torch.Tensor


@pytest.mark.daily("sharded")
@pytest.mark.parametrize("how", WRITE)
def test_it_is_put_where_lightning_is_told(tmp_path, how):
    WRITE[how](Plain(), tmp_path / "a.ckpt")
    with torch.device("meta"):
        meta = bh.training.load_from_checkpoint(Plain, tmp_path / "a.ckpt", map_location="meta")
    assert meta.device.type == "meta"


@pytest.mark.daily("not weights alone")
@pytest.mark.parametrize(
    "told",
    [{}, {"map_location": lambda storage, _: storage}, {"weights_only": False}],
    ids=["nothing", "where by a function", "not weights alone"],
)
def test_a_file_is_loaded_as_lightning_would(tmp_path, told):
    lit = in_a_file(Plain(), tmp_path / "a.ckpt")
    found = bh.training.load_from_checkpoint(Plain, str(tmp_path / "a.ckpt"), width=64, **told)
    assert same(found.state_dict(), lit.state_dict())
    assert found.hparams == {"width": 64}
    assert all(torch.equal(found.seen[name], value.sum()) for name, value in lit.state_dict().items())


def test_what_is_exported_computes_the_same(tmp_path):
    (tmp_path / "shards").mkdir()
    lit = sharded(Plain(), tmp_path / "shards")
    export(tmp_path / "shards", tmp_path / "exported")
    ids = tokens()
    assert torch.equal(bh.load(tmp_path / "exported")(ids).logits, lit.model.eval()(ids).logits)


@pytest.mark.daily("sharded-TransformerModule")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says in /proc/self/maps what is mapped")
@pytest.mark.parametrize("kind", [Plain, bh.TransformerModule])
@pytest.mark.parametrize("how", WRITE)
def test_loading_takes_the_module_and_a_tensor(tmp_path, how, kind):
    options = {"model": llama(vocab_size=2048)} if kind is bh.TransformerModule else {}
    expected = WRITE[how](kind(**options), tmp_path / "a.ckpt").state_dict()
    options = {"model": llama(vocab_size=2048)} if options else {}
    with Held(but=tmp_path / "a.ckpt") as held:
        found = bh.training.load_from_checkpoint(kind, tmp_path / "a.ckpt", **options)
    assert same(found.state_dict(), expected)
    assert held.most <= size(expected) + 1.1 * max(value.nbytes for value in expected.values())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the device is there")
def test_a_file_of_a_device_that_is_not_there_is_loaded_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        lit = in_a_file(Plain(), tmp_path / "a.ckpt")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    found = bh.training.load_from_checkpoint(Plain, tmp_path / "a.ckpt")
    assert same(found.state_dict(), lit.state_dict())
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with pytest.raises(RuntimeError, match="CUDA"):  # it would be put there
        bh.training.load_from_checkpoint(Plain, tmp_path / "a.ckpt")
