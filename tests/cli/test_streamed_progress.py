"""Bars over the blocks of a streamed model, and what is read and written, said before."""

import io
import re
from math import prod

import pytest
import torch

import billhook as bh
from billhook.cli.machine import model_progress
from billhook.cli.main import main
from billhook.engine import files as streams
from billhook.engine.tensors import TensorFiles
from kit.cli import option, small_llama

SHORT = ["--polish", "null", "--length", "16", "--examples", "6", "--evaluate", "5", "--supplement", "0"]


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal, and returns what is written to it."""

    def made():
        out = io.StringIO()
        out.isatty = lambda: True
        monkeypatch.setattr("sys.stderr", out)
        for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        return out

    return made


@pytest.fixture
def read(monkeypatch):
    """The name and the bytes of each tensor of a block that is read, as a whole or in rows."""
    found, original, rows = [], streams.load_tensors, TensorFiles.rows

    def counted(model, slices):
        for key, one in slices.items():
            if ".layers." in key:
                found.append((key, prod(one.get_shape()) * model.dtype.itemsize))
        original(model, slices)

    def counted_rows(self, name, elements):
        some = list(rows(self, name, elements))
        if ".layers." in name:
            found.append((name, sum(one.nbytes for one in some)))
        return iter(some)

    monkeypatch.setattr(streams, "load_tensors", counted)
    monkeypatch.setattr(TensorFiles, "rows", counted_rows)
    return found


def test_a_pass_over_blocks(terminal):
    model, stderr = bh.stream("tiny"), terminal()
    with model_progress(model, "reading", "batches") as told, torch.no_grad():
        model(torch.arange(8)[None])
        told(5, 7)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stderr.getvalue())
    assert "3/4 blocks left: " in shown, "the last one is still there"
    assert re.search(r"peak \d\.\d GiB", shown)
    assert "batches" not in shown


def plan_of(dense, passes):
    """What is said of so many passes over the blocks of a small Llama."""
    model = bh.load(dense)
    blocks, written = (sum(p.nbytes for p in part.parameters()) for part in (model.model.layers, model))
    return f"stream 2 blocks in {passes} passes (read {passes * blocks / 1e6:,.1f} MB, write {written / 1e6:,.1f} MB)"


PRUNED = [([], 7), (["--allocation", "OWL"], 8), (["--criterion", "Magnitude", "--criterion.compares", "global"], 9)]


@pytest.mark.parametrize(("how", "passes"), PRUNED, ids=["alike", "OWL", "global"])
def test_the_plan_says_what_is_read_and_written(files, tmp_path, capsys, read, how, passes):
    dense, out = small_llama(tmp_path / "dense"), tmp_path / "out"
    main(["prune", str(dense), str(out), *SHORT, *option(files), "--sparsity", "0.5", "--stream", *how])
    said = capsys.readouterr()
    assert plan_of(dense, passes) in said.out
    blocks = sum(p.nbytes for p in bh.load(dense).model.layers.parameters())
    assert sum(size for _, size in read) == (1 + passes) * blocks, "once to count zeros, before it is said"
    assert "peak" not in said.err


REMOVALS = {
    "prune-heads --ratio 0.5 --importance OutputNorm --repair null": 5,  # scored in two, masked, cut and compared
    "prune-heads --ratio 0.5 --importance OutputNorm --repair RepairConfig": 7,  # and refitted in two
    "prune-structure --channels 0.25 --importance OBS --repair RepairConfig": 6,  # scored in one, and refitted in two
    "prune-structure --residual 0.25 --importance WeightNorm --repair null": 4,  # scored in one, cut, and compared twice
    "prune-blocks --blocks 1 --first 1 --importance Ablation --repair null": 6 * 5 + 12,  # whole, and without each
}


@pytest.mark.daily("prune-structure --channels*")
@pytest.mark.parametrize(("how", "expected"), REMOVALS.items(), ids=REMOVALS)
def test_the_plan_of_a_removal_says_what_is_read(files, tmp_path, capsys, read, how, expected):
    dense, (command, *asked) = small_llama(tmp_path / "dense", num_hidden_layers=4), how.split()
    more = [*SHORT, "--batch_size", "1", *option(files), *asked, "--stream"]
    main([command, str(dense), str(tmp_path / "out"), *more])
    passes = expected + 5
    assert f"stream 4 blocks in {passes} passes" in capsys.readouterr().out
    often = sum(key.endswith("layers.0.input_layernorm.weight") for key, _ in read)
    before = 2 if command == "prune-blocks" else 1
    assert often == before + passes, "once to count zeros, and to find blocks, before it is said"
