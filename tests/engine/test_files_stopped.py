"""Streamed work that is stopped goes on where it was; what fails says so, and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_configs import OVERRIDES, small_config

import billhook as bh
from kit import prunes, stopped

TESTS = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    model = bh.load("tiny")
    model.save_pretrained(tmp_path / "dense", max_shard_size="3MB")
    return tmp_path / "dense"


def tensors(folder):
    return {key: one for file in Path(folder).glob("*.safetensors") for key, one in load_file(file).items()}


def same(folder, other):
    one, two = tensors(folder), tensors(other)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.daily("5")
@pytest.mark.parametrize("times", [5, 30])
def test_killed_at_any_moment(source, tmp_path, times):
    command = [sys.executable, TESTS / "kit" / "stopped.py", source, tmp_path / "out", str(times)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=600)
    assert done.returncode == 0, done.stderr
    stops, resumed = map(int, done.stdout.split())
    assert stops == times
    assert resumed > times // 6, "nothing was there to go on with"
    assert same(tmp_path / "out", tmp_path / "out-straight")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.daily("4")
@pytest.mark.parametrize("blocks", [2, 4, 7])
def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch, blocks):
    """Masks and values are written first, and then the blocks that they are of."""
    stopped.work(source, tmp_path / "straight")
    written, go_on = stopped.stop_after(blocks, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        stopped.work(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    go_on()
    stopped.work(source, tmp_path / "out")
    assert written == [f"model.layers.{number}" for number in range(4)] * 2
    assert same(tmp_path / "out", tmp_path / "straight")


def test_other_work_begins_afresh(source, tmp_path):
    model = bh.stream(source, tmp_path / "out")
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    other = bh.stream(source, tmp_path / "out")
    bh.prune(other, bh.Magnitude(), sparsity=0.25)
    bh.save(other, tmp_path / "out")
    expected = bh.load(source)
    bh.prune(expected, bh.Magnitude(), sparsity=0.25)
    found = bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.state_dict().items())


def other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))


def same_size_and_time(folder):
    """Replaces a shard as `rsync -t` does."""
    shard = max(folder.glob("*.safetensors"))
    before, data = shard.stat(), shard.read_bytes()
    shard.with_suffix(".new").write_bytes(data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    shard.with_suffix(".new").replace(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def in_rows_of_half_the_length(batches):
    return [{"input_ids": batch["input_ids"].view(2, -1)} for batch in batches]


def with_a_mask(batches, name):
    return [batch | {name: torch.arange(64).lt(40)[None].long()} for batch in batches]


@pytest.mark.daily("dtype", "config.json", "a shard of equal size and time")
@pytest.mark.parametrize(
    ("then", "now", "changes"),
    [
        ({}, {"dtype": "float32"}, None),
        ({}, {"batches": in_rows_of_half_the_length(stopped.batches())}, None),
        (
            {"batches": with_a_mask(stopped.batches(), "position_ids")},
            {"batches": with_a_mask(stopped.batches(), "attention_mask")},
            None,
        ),
        ({}, {}, other_config),
        ({}, {}, same_size_and_time),
    ],
    ids=["dtype", "row lengths", "name of a mask", "config.json", "a shard of equal size and time"],
)
def test_what_was_made_of_something_else_is_not_taken(source, tmp_path, monkeypatch, then, now, changes):
    def work(out, dtype="auto", batches=None):
        model = bh.stream(source, out, dtype)
        bh.prune(model, bh.Wanda(), batches or stopped.batches(), sparsity=0.5)
        bh.save(model, out)

    written, go_on = stopped.stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out", **then)
    go_on()
    if changes is not None:
        changes(source)
    work(tmp_path / "out", **now)
    assert written == [f"model.layers.{number}" for number in (0, 1, 0, 1, 2, 3, 0, 1, 2, 3)]
    work(tmp_path / "straight", **now)
    assert same(tmp_path / "out", tmp_path / "straight")
    assert {one.dtype for one in tensors(tmp_path / "out").values()} == {bh.load(tmp_path / "out").dtype}


def test_two_steps(source, tmp_path):
    def both(model):
        bh.prune(model, bh.Wanda(), stopped.batches(), sparsity=0.25)
        bh.prune(model, bh.Wanda(), stopped.batches(), pattern="2:4")
        return model

    bh.save(both(bh.stream(source, tmp_path / "out")), tmp_path / "out")
    expected, found = both(bh.load(source)).state_dict(), bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_after_it_is_saved(source, tmp_path):
    model = bh.stream(source, tmp_path / "out")
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    bh.save(model, tmp_path / "out")
    given = stopped.batches()[0]
    with torch.no_grad():
        assert torch.equal(model(**given).logits, bh.load(tmp_path / "out")(**given).logits)
    bh.prune(model, bh.Magnitude(), pattern="2:4")
    bh.save(model, tmp_path / "out")
    expected = bh.load(source)
    bh.prune(expected, bh.Magnitude(), sparsity=0.5)
    bh.prune(expected, bh.Magnitude(), pattern="2:4")
    found = bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.state_dict().items())


def test_a_shard_that_changes_meanwhile(source, tmp_path):
    model = bh.stream(source, tmp_path / "out")
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=rf"'{shard}' has changed since it was first read"):
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_a_broken_shard(source, tmp_path):
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"'{source}': a safetensors file cannot be read"):
        bh.stream(source, tmp_path / "out")


def test_a_full_disk(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = bh.stream(source, tmp_path / "out")
    monkeypatch.setattr("billhook.engine.parts.save_file", full)
    with pytest.raises(OSError, match="model.layers.0 cannot be written to .*No space left.*. 0 blocks are finished"):
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_only_read(source):
    with pytest.raises(ValueError, match=r"the streamed model is read-only. Pass an output folder: bh.stream\(folder, out\)"):
        bh.prune(bh.stream(source), bh.Magnitude(), sparsity=0.5)


def test_ranks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reduce is not supported for a streamed model"):
        bh.prune(bh.stream("tiny", tmp_path / "out"), bh.Magnitude(), sparsity=0.5, reduce=lambda one: one)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "refusal"), [
    (transformers.ZambaForCausalLM, "shares its weight with another layer. Prune the model in memory"),
    (
        transformers.DoryForCausalLM,
        "is called twice, but blocks are loaded one at a time. Use bh.load",
    ),
    (
        transformers.HrmTextForCausalLM,
        "is called twice, but blocks are loaded one at a time. Use bh.load",
    ),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:these weights hold several matrices")
def test_linears_that_several_blocks_call(tmp_path, kind, refusal):
    config = small_config(kind.config_class, **OVERRIDES.get(kind.config_class.model_type, {}))
    kind(config).save_pretrained(tmp_path / "dense")
    given = [{"input_ids": batch["input_ids"] % 90 + 5} for batch in stopped.batches()]
    for sequential in ("block", "layer", "none"):
        with pytest.raises(ValueError, match=refusal):
            prunes.prune(bh.stream(tmp_path / "dense", tmp_path / "out"), bh.Wanda(), given, sparsity=0.5, sequential=sequential)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]  # nothing was written


@pytest.mark.daily("convert_kv_heads-2")
@pytest.mark.parametrize(("step", "blocks"), [(bh.prune, 2), (bh.prune, 6), (bh.convert_kv_heads, 2), (bh.convert_kv_heads, 6)])
def test_after_an_error_the_model_is_as_it_was_and_the_same_call_goes_on(source, tmp_path, monkeypatch, step, blocks):
    given = stopped.batches()
    asked = (bh.Wanda(), given, 0.5) if step is bh.prune else (1, "svd", given)
    model, dense = bh.stream(source, tmp_path / "out"), bh.load(source)
    written, go_on = stopped.stop_after(blocks, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        step(model, *asked)
    with torch.no_grad():
        assert torch.equal(model(**given[0]).logits, dense(**given[0]).logits)
    go_on()
    step(model, *asked)
    assert written == [f"model.layers.{number}" for number in range(4)] * 2  # masks, or heads in one basis, and then the blocks
    bh.save(model, tmp_path / "out")
    step(dense, *asked)
    found = bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in dense.state_dict().items())
