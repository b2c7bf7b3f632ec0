"""Shards of a hub's model are fetched when something in them is needed, once each; a server on the loopback says when."""

import json

import pytest
import torch

import billhook as bh
from billhook.cli.main import main
from billhook.engine.parts import Parts
from kit.shards import shelf

NAME = "someone/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    bh.load("tiny").save_pretrained(tmp_path / "served", max_shard_size="1200KB")
    with shelf(tmp_path / "served", monkeypatch, tmp_path / "cache") as held:
        yield held


def shards(asked):
    return [file for file in asked if file.endswith(".safetensors")]


def shards_of(hub, part):
    """The shards that hold a block, or what is in no block, in the order of their names."""
    where = json.loads((hub.folder / "model.safetensors.index.json").read_text())["weight_map"]
    inside = {file for key, file in where.items() if key.startswith(part or "model.") and (part or ".layers." not in key)}
    return sorted(inside)


def test_each_shard_comes_when_it_is_needed(hub, tmp_path, monkeypatch):
    model = bh.stream(NAME, tmp_path / "out")
    rest = shards_of(hub, "")
    every = {path.name for path in hub.folder.glob("*.safetensors")}
    assert sorted(shards(hub.asked)) == rest
    assert set(hub.bytes_of) == every, "sizes come from headers"
    assert len(every) > len(rest) + 1
    write = Parts.write

    def marked(parts, name, tensors, note):
        hub.asked.append(f"{name}.")
        write(parts, name, tensors, note)

    monkeypatch.setattr(Parts, "write", marked)
    hub.asked.clear()
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    expected, there = [], set(rest)
    for number in range(4):
        block = f"model.layers.{number}."
        expected += [file for file in shards_of(hub, block) if file not in there]
        there |= set(expected)
        expected.append(block)
    expected += [
        f"model.layers.{number}." for number in range(4)
    ]  # masks are written first, and then the blocks that they are of
    assert [one for one in hub.asked if one.endswith((".", ".safetensors"))] == expected
    bh.save(model, tmp_path / "out")
    dense = bh.load("tiny")
    bh.prune(dense, bh.Magnitude(), sparsity=0.5)
    found = bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], one) for name, one in dense.state_dict().items())
    hub.asked.clear()
    again = bh.stream(NAME)
    with torch.no_grad():
        again(torch.arange(8)[None])
    assert shards(hub.asked) == [], "no shard is fetched twice"


def test_one_file(tmp_path, monkeypatch):
    bh.load("tiny").save_pretrained(tmp_path / "served")
    with shelf(tmp_path / "served", monkeypatch, tmp_path / "cache") as held:
        main(["summary", NAME, "--stream"])
        assert shards(held.asked) == []
        bh.stream(NAME)
        assert shards(held.asked) == ["model.safetensors"]


def test_a_shard_that_the_hub_has_no_more(hub, tmp_path):
    model = bh.stream(NAME, tmp_path / "out")
    gone = next(file for file in shards_of(hub, "model.layers.2.") if file not in hub.asked)
    (hub.folder / gone).unlink()
    with pytest.raises(ValueError, match=f"'{NAME}': a safetensors file cannot be read: .*{gone}"):
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
    assert not (tmp_path / "out").exists()
