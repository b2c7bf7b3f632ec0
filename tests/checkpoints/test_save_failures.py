"""A full disk, a folder that cannot be written, or a crash leaves the files that were there, and no drafts."""

import copy
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import billhook as bh
from billhook.checkpoints.export import export
from billhook.cli.main import main
from kit.families import llama
from kit.fits import trainer

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
FULL = OSError(errno.ENOSPC, "No space left on device")


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def full(monkeypatch):
    """A disk that is full at the k-th thing that is written: files of weights, of text, and the syncing of any."""

    def at(count):
        calls = []

        def filling(owner, name):
            real = getattr(owner, name)

            def write(*args, **options):
                calls.append(name)
                if len(calls) == count:
                    raise FULL
                return real(*args, **options)

            monkeypatch.setattr(owner, name, write)

        filling(transformers.modeling_utils, "safe_save_file")
        filling(PreTrainedModel, "save_pretrained")
        for owner, name in ((Path, "write_text"), (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "chmod")):
            filling(owner, name)
        return calls

    return at


def older(folder):
    bh.save(llama(**SMALL, vocab_size=32), folder)
    return listing(folder)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    module, path = bh.TransformerModule(llama(**SMALL)), tmp_path_factory.mktemp("ckpt") / "last.ckpt"
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


class Quiet(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = llama(**SMALL).train()

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def by_callback(folder, _):
    ids = torch.randint(3, 60, (2, 6))
    run = trainer(folder.parent, [bh.Export(str(folder))], max_steps=1)
    rows = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    run.fit(Quiet(), rows, rows)


WAYS = {
    "save": lambda folder, _: bh.save(llama(**SMALL), folder),
    "shaped": lambda folder, _: bh.save(uneven(), folder),
    "export": lambda folder, ckpt: export(ckpt, folder),
    "callback": by_callback,
}


def uneven():
    model = llama(**SMALL)
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(channels=0.4, ranking="global")))
    return model


@pytest.mark.daily("*-older")
@pytest.mark.filterwarnings("ignore:(Export. )?no tokenizer (was saved, because|or processor was found)")
@pytest.mark.parametrize("standing", ["nothing", "older"])
@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_is_full_at_any_moment(way, standing, ckpt, tmp_path, full):
    target = tmp_path / "out" / "a"
    if standing == "older":
        older(target)
    else:
        target.parent.mkdir()
    before, torn = listing(tmp_path), 0
    for count in range(1, 60, 1 if way == "save" else 7):
        with pytest.MonkeyPatch.context():
            full(count)
            try:
                WAYS[way](target, ckpt)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                torn += 1
        assert listing(tmp_path) == before, count
    assert torn >= (6 if way == "save" else 2)
    assert bh.load(target).config.vocab_size == 64
    assert [name for name in os.listdir(target.parent) if not name.startswith(".")] == ["a"]


@pytest.mark.parametrize("standing", ["nothing", "empty", "older"])
def test_the_last_moment(standing, tmp_path, monkeypatch):
    """The disk fails when the new checkpoint stands, and is not yet known to be safe."""
    target, seen, real = tmp_path / "a", [], os.fsync
    if standing == "empty":
        target.mkdir()
    before = older(target) if standing == "older" else {}
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.readlink(f"/proc/self/fd/{number}")) or real(number))
    bh.save(llama(**SMALL), tmp_path / "other")
    assert seen[-1] == str(tmp_path)
    shutil.rmtree(tmp_path / "other")

    def fails(number):
        if os.readlink(f"/proc/self/fd/{number}") == str(tmp_path):
            raise FULL

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        bh.save(llama(**SMALL), target)
    assert listing(target) == before
    assert os.listdir(tmp_path) == ([] if standing == "nothing" else ["a"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        bh.save(llama(**SMALL), tmp_path / "locked" / "a")
    assert listing(tmp_path) == {"locked": None}


def test_a_command_says_that_the_disk_is_full(files, tmp_path, monkeypatch):
    bh.save(llama(vocab_size=2048, **SMALL), tmp_path / "source", bh.TextDataModule("tiny", "tiny").tokenizer)
    older(tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", lambda *_, **__: _raise(FULL))
    words = ["--sparsity", "0.5", "--criterion", "Magnitude", "--evaluate", "0", "--data", json.dumps(files), "--length", "16"]
    words += ["--polish", "null"]
    with pytest.raises(SystemExit) as stopped:
        main(["prune", str(tmp_path / "source"), str(tmp_path / "out"), *words])
    assert stopped.value.code == f"billhook prune: {FULL}"
    assert listing(tmp_path) == before


def _raise(error):
    raise error


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_names_that_no_folder_can_have(name, tmp_path):
    for write in (lambda: bh.save(llama(), tmp_path / name), lambda: bh.stream("tiny", tmp_path / name)):
        with pytest.raises(ValueError, match="folder: .*(contains a zero byte|has a name of 300 bytes).* Choose another name"):
            write()
    with pytest.raises(ValueError, match="'/' is a mount point|'/' is not a billhook checkpoint"):
        bh.save(llama(), "/")
    assert list(tmp_path.iterdir()) == []


def used_twice(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def tied(model):
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight


@pytest.mark.parametrize("change", [used_twice, tied])
def test_weights_that_are_shared_by_hand(change, tmp_path):
    model, (one, other) = llama(), [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]
    change(model)
    with pytest.raises(ValueError, match=f"model: {one} and {other} share a tensor that .* does not tie. Copy it"):
        bh.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    assert bh.save(model, tmp_path / "a").difference == 0


@pytest.mark.parametrize("way", ["save", "stream"])
def test_folders_that_cannot_be_opened_and_files_that_only_a_writer_flushes(way, tmp_path, monkeypatch):
    """The two rules of Windows."""
    opened, flushed = os.open, os.fsync

    def open_file(path, *how, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **named)

    def flush(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed(descriptor)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush)
    target = tmp_path / "a"
    model = bh.load("tiny") if way == "save" else bh.stream("tiny", target)
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    bh.save(model, target)
    bh.save(model, target)
    monkeypatch.undo()
    assert {float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in bh.load(target).model.layers} == {0.5}


def test_a_checkpoint_renamed_by_a_killed_save_stays_until_another_takes_its_place(tmp_path, monkeypatch):
    old = tmp_path / ".a.old-01234567"  # as a process leaves it that is killed between the two renames
    bh.save(llama(), tmp_path / "a")
    (tmp_path / "a").rename(old)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: _raise(FULL))
        with pytest.raises(OSError, match="No space"):
            bh.save(llama(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    bh.save(llama(), tmp_path / "a")
    assert old.exists()
    bh.save(llama(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
