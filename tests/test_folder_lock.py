"""One process at a time writes to a folder, and what it leaves when it is killed keeps nobody out."""

import os
import re
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import pytest

import billhook as bh
from billhook.atomic_folder import RECORD
from billhook.cli.main import main
from billhook.engine.parts import MARK
from billhook.folder_lock import FolderLock, lock_folder
from kit.events import SIZES, Own, loader
from kit.families import llama
from kit.fits import trainer


@contextmanager
def elsewhere(target, what=None):
    """Has another process claim a folder, and do something, until the end of a `with` block; yields the number of the process."""
    ready, said = os.pipe()
    wait, go = os.pipe()
    if not (number := os.fork()):
        os.close(go)
        with lock_folder(target):
            if what is not None:
                what()
            os.write(said, b"claimed")
            os.read(wait, 1)
        os._exit(0)
    os.read(ready, 7)
    os.close(wait)
    try:
        yield number
    finally:
        os.close(go)
        os.waitpid(number, 0)
        os.close(ready)
        os.close(said)


def fit(folder, target, *callbacks):
    trainer(folder, [*callbacks, bh.Export(str(target), tokenizer="tiny")], max_steps=1).fit(
        Own(vocab_size=2048), loader(), loader(4, 4)
    )


def refusal(target):
    return rf"another run is writing to '{re.escape(str(target))}'. Wait until it ends, or choose another folder."


def test_another_process_is_kept_out_until_the_first_has_ended(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with elsewhere(target):
        with pytest.raises(ValueError, match=refusal(target)), lock_folder(target):
            pass
        with pytest.raises(ValueError, match=refusal(target)):
            bh.save(llama(**SIZES), target)
        with lock_folder(tmp_path / "a" / "b" / "other"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_keeps_nobody_out(tmp_path):
    target = tmp_path / "out"
    with elsewhere(target) as number:
        os.kill(number, signal.SIGKILL)
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / ".out.lock").exists()
        with lock_folder(target):
            with lock_folder(target):  # the same process may claim it again
                pass
            assert (tmp_path / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_belongs_to_all_threads_and_not_to_a_forked_process(tmp_path):
    target, found = tmp_path / "out", []

    def lock_again():
        with lock_folder(target):
            found.append("locked")

    locks = [FolderLock(target)]
    thread = threading.Thread(target=lock_again)
    thread.start()
    thread.join()
    assert found == ["locked"]
    if not (number := os.fork()):
        locks.clear()  # the child drops its copy
        try:
            lock_again()
        except ValueError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(number, 0)[1] == 0
    assert (tmp_path / ".out.lock").exists()
    locks.clear()
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_streams_is_kept_out_and_what_is_there_stays(tmp_path):
    target = tmp_path / "out"

    def prune(sparsity):
        model = bh.stream("tiny", target)
        bh.prune(model, bh.Magnitude(), sparsity=sparsity)
        return model

    with elsewhere(target, lambda: prune(0.5)):
        before = sorted((tmp_path / ".out.parts").rglob("*"))
        with pytest.raises(ValueError, match=refusal(target)):
            prune(0.25)
        assert sorted((tmp_path / ".out.parts").rglob("*")) == before
    bh.save(prune(0.25), target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [[], ["--stream"], ["--dry_run"]], ids=["in memory", "streamed", "a dry run"])
def test_a_command_is_refused_before_it_loads(tmp_path, monkeypatch, how):
    monkeypatch.setattr("billhook.cli.one_shot.OneShot.__init__", None)
    words = ["prune", "tiny", str(tmp_path / "out"), "--sparsity", "0.5", "--criterion", "Magnitude", *how]
    with (
        elsewhere(tmp_path / "out"),
        pytest.raises(SystemExit, match=f"billhook prune: {refusal(tmp_path / 'out')}"),
    ):
        main(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /sys, where even root makes no file")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("billhook.cli.one_shot.OneShot.__init__", None)
    said = r"'/sys/out' cannot be written: no file can be created in '/sys' \(.*\)"
    with pytest.raises(SystemExit, match=f"^billhook prune: {said}$"):
        main(["prune", "tiny", "/sys/out", "--sparsity", "0.5"])
    with pytest.raises(OSError, match=said):
        bh.save(llama(**SIZES), "/sys/out")
    with pytest.raises(OSError, match=said):
        fit(tmp_path, "/sys/out")


def test_a_fit_keeps_others_out_from_before_the_first_step_until_it_ends(tmp_path):
    target = tmp_path / "out"

    class Locked(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert (tmp_path / ".out.lock").exists()
            if fails:
                raise RuntimeError("halfway")

    with elsewhere(target), pytest.raises(ValueError, match=refusal(target)):
        fit(tmp_path, target)
    for fails in (True, False):
        with pytest.raises(RuntimeError, match="halfway") if fails else nullcontext():
            fit(tmp_path, target, Locked())
        assert not (tmp_path / ".out.lock").exists()


OTHERS = {
    ".out.parts": (
        lambda folder: bh.stream("tiny", folder / "out"),
        rf"'.*/\.out\.parts' is needed for changed blocks, but was not written by billhook \(no {MARK}\)",
    ),
    ".out.rehearsal": (
        lambda folder: fit(folder, folder / "out"),
        rf"'.*/\.out\.rehearsal' is not a billhook checkpoint \(no {RECORD}\) and will not be overwritten",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_that_billhook_did_not_write_is_left_alone(tmp_path, name):
    """It is refused before anything is done, whatever its name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    write, match = OTHERS[name]
    with pytest.raises(ValueError, match=match):
        write(tmp_path)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_an_output_that_billhook_did_not_write_is_refused_before_the_model_is_streamed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"out' is not a billhook checkpoint .no {RECORD}"):
        bh.stream("nowhere/at-all", tmp_path / "out")
