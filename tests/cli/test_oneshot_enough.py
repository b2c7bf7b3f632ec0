"""Commands choose units on as many examples as settle it, say so, and repair and measure on all."""

import json

import pytest
import torch

import billhook as bh
from billhook.calibration.enough import interleaved
from billhook.cli.main import main
from billhook.running.batches import Batch
from kit.cli import blocks, option, small_llama

SHORT = ["--length", "16", "--evaluate", "2", "--batch_size", "1"]
IDS = torch.arange(40).view(2, 20)


def run(command, model, out, *arguments):
    main([command, str(model), str(out), *arguments])
    return json.loads((out / "billhook.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def all_rows(files):
    """The rows of the text, fewer than the default number, in the order in which they are drawn."""
    rows = blocks(files["train"])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def test_structure(small, files, all_rows, tmp_path, capsys):
    text = ["--generated", "0", *option(files)]
    record = run("prune-structure", small, tmp_path / "out", "--channels", "0.5", "--enough", "0.6", *SHORT, *text)
    (settled,) = record["events"][0]["settled"]
    assert settled["batches"] < settled["of"] == len(all_rows)
    assert min(settled["halves"], settled["doubling"]) >= settled["enough"] == 0.6
    assert record["calibration"]["enough"] == 0.6
    says = f"chosen on {settled['batches']} of {len(all_rows)} batches: two halves agree on"
    assert settled["says"].startswith(says)
    assert f"  {settled['says']}\n" in capsys.readouterr().out
    assert f"\n  - {settled['says']}\n" in (tmp_path / "out" / "README.md").read_text()
    dense, every = bh.load(small), [Batch({"input_ids": row[None], "labels": row[None]}) for row in all_rows]
    plan = bh.plan(dense, bh.OutputNorm(), interleaved(every)[: settled["batches"]], channels=0.5)
    assert plan.to_json() == record["plans"][0]
    bh.apply(dense, plan, weights=bh.repair(dense, plan, every))
    with torch.no_grad():
        torch.testing.assert_close(bh.load(tmp_path / "out")(IDS).logits, dense(IDS).logits)


def test_by_default_where_no_number_of_examples_is_given(small, files, tmp_path, capsys):
    how = ["--blocks", "1", "--channels", "0.5", "--repair", "null", *SHORT, *option(files)]
    settled = run("prune-structure", small, tmp_path / "default", *how)["events"][0]["settled"]
    assert [one["enough"] for one in settled] == [0.99, 0.99]
    assert settled[1]["batches"] == settled[1]["of"] > 12
    assert "batches, which do not settle it (asked for was 99%): two halves agree on" in settled[1]["says"]
    assert settled[1]["says"] in capsys.readouterr().out
    for place, other in enumerate((["--enough", "null"], ["--examples", "12"])):
        record = run("prune-structure", small, tmp_path / str(place), *how, *other)
        assert "settled" not in record["events"][0]
        assert record["calibration"]["enough"] is None
    record = run("prune-structure", small, tmp_path / "both", *how, "--examples", "12", "--enough", "1.0")
    assert {one["of"] for one in record["events"][0]["settled"]} == {12}
    assert "settled" not in run("prune-structure", small, tmp_path / "norm", *how[2:], "--importance", "WeightNorm")["events"][0]


def test_heads(small, files, tmp_path, capsys):
    how = ["--ratio", "0.5", "--per", "kv_head", "--rounds", "2", *SHORT, *option(files)]
    record = run("prune-heads", small, tmp_path / "out", *how, "--enough", "0.5")
    settled, said = record["events"][0]["settled"], capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(settled) == 2
    assert all(f"{one['says']}\n" in said and f"  - {one['says']}\n" in card for one in settled)
    assert settled[0]["of"] > settled[0]["batches"]
    plain = run("prune-heads", small, tmp_path / "all", *how, "--enough", "null")
    assert "settled" not in plain["events"][0]


@pytest.mark.parametrize("enough", ["0.0", "1.5"])
def test_refused(small, tmp_path, enough):
    with pytest.raises(SystemExit, match=rf"enough={enough} must be in \(0, 1\]"):
        main(["prune-heads", str(small), str(tmp_path / "out"), "--ratio", "0.5", "--enough", enough])
