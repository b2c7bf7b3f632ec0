"""`billhook prune-structure`: from the shell to a smaller checkpoint."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from billhook.calibration.calibration import Calibration
from billhook.cli.main import main
from billhook.engine.batches import Batch, source_of
from billhook.private_paths import without_folders
from kit.cli import blocks, drawn, option, perplexity, small_llama
from kit.printed import assert_printed
from kit.published import record_of

SHORT = ["--polish", "null", "--length", "16", "--examples", "6", "--evaluate", "5", "--batch_size", "4"]


OFF = ["--effort", "fast"]
IDS = torch.arange(40).view(2, 20)


def prune(model, out, *arguments):
    main(["prune-structure", str(model), str(out), *arguments])
    return record_of(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def two_texts(files, tmp_path_factory):
    """Paths of files `one` and `other`, which have no split to test on."""
    folder = tmp_path_factory.mktemp("texts")
    return [str(shutil.copy(files["train"], folder / f"{name}.txt")) for name in ("one", "other")]


def test_ratios(small, files, tmp_path, capsys):
    record = prune(small, tmp_path / "out", "--kv_heads", "0.5", "--channels", "0.25", *OFF, *SHORT, *option(files))
    dense, rows = bh.load(small), blocks(files["train"])
    plan = bh.plan(dense, bh.OutputNorm(), drawn(rows, 4), kv_heads=0.5, channels=0.25)
    assert record["plans"] == [plan.to_json()]
    held_out = blocks(files["validation"])[:5]
    before = perplexity(dense, held_out)
    bh.apply(dense, plan)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (again.config.intermediate_size, again.config.num_key_value_heads) == (36, 2)
    with torch.no_grad():
        assert torch.equal(again(rows[:2]).logits, dense(rows[:2]).logits)
    assert record["perplexity"]["before"] == pytest.approx(before, rel=1e-4)
    assert record["perplexity"]["after"] == pytest.approx(perplexity(dense, held_out), rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- without {plan.words}\n" in card
    assert "| parameters | {:,} | {:,} |".format(*plan.parameters) in card
    said = capsys.readouterr().out
    assert str(plan) in said
    assert_printed("prune-structure", said)


@pytest.mark.nightly
def test_a_target_in_rounds(small, files, tmp_path):
    record = prune(
        small, tmp_path / "out", "--params", "0.95", "--rounds", "2", "--ranking", "global", *OFF, *SHORT, *option(files)
    )
    dense, again = bh.load(small), bh.load(tmp_path / "out")
    assert len(record["plans"]) == 2
    first = bh.ModelPlan.from_json(record["plans"][0], dense)
    whole = bh.summary(dense).params
    assert 0.97 * whole < first.parameters[1] <= 0.975 * whole
    replayed = copy.deepcopy(dense)
    bh.apply(replayed, first)
    bh.apply(replayed, bh.ModelPlan.from_json(record["plans"][1], replayed))
    assert bh.summary(again).params == bh.summary(replayed).params <= 0.95 * whole
    with torch.no_grad():
        ids = blocks(files["train"])[:2]
        assert torch.equal(again(ids).logits, replayed(ids).logits)


def test_what_stays_makes_up_for_what_goes(small, files, tmp_path):
    """By default, and better than not, on text that it has not seen."""
    text = ["--supplement", "0", *option(files)]
    arguments = ["--polish", "null", "--channels", "0.5", "--length", "16", "--examples", "24", "--evaluate", "8", *text]
    repaired, not_repaired = prune(small, tmp_path / "one", *arguments), prune(small, tmp_path / "other", *arguments, *OFF)
    assert repaired["importance"]["repair"].startswith("RepairConfig(")
    assert not_repaired["importance"]["repair"] is None
    dense, rows = bh.load(small), blocks(files["train"])
    batches = drawn(rows, 8, 24)
    plan = bh.plan(dense, bh.OutputNorm(), batches, channels=0.5)
    weights = bh.repair(dense, plan, batches)
    assert set(weights) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    bh.apply(dense, plan, weights=weights)
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "one")(rows[:2]).logits, dense(rows[:2]).logits)


def test_beside_one_text_linears_are_refitted_to_other_text(small, files, tmp_path):
    record = prune(small, tmp_path / "out", "--channels", "0.5", *SHORT, *option(files))
    read, inside = record["calibration"], {one["source"]: one["inside"] for one in record["degradation"]}
    assert (read["sources"], read["weights"]) == ([without_folders(files), "mixed", "generated"], [0.5, 0.25, 0.25])
    assert inside == {Path(files["train"]).stem: True, "mixed": True, "generated": True, "unseen": False}
    assert "Only text of the calibration sources was measured." not in (tmp_path / "out" / "README.md").read_text()
    dense = bh.load(small)
    text = bh.Calibration([files, "mixed", "generated"], [2, 1, 1], 6 * 16, 16, 2, tokenizer=str(small))
    batches = [Batch(one | {"labels": one["input_ids"]}, one.source) for one in text.read(dense)]
    assert [len(one["input_ids"]) for one in batches] == [2, 1, 2, 2]
    plan = bh.plan(dense, bh.OutputNorm(), batches, channels=0.5)
    bh.apply(dense, plan, weights=bh.repair(dense, plan, batches))
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "out")(IDS).logits, dense(IDS).logits)


@pytest.mark.daily("given0-*", "given3-*")
@pytest.mark.parametrize(
    ("given", "weights", "rows"),
    [
        ([], [0.25, 0.25, 0.25, 0.25], [2, 2, 2, 2]),
        (["--supplement", "0"], None, [4, 4]),
        (["--supplement", "0.25"], [0.375, 0.375, 0.125, 0.125], [3, 3, 1, 1]),
        (OFF, None, [4, 4]),
    ],
)
def test_several_texts_share_what_the_model_does_not_write(small, two_texts, tmp_path, monkeypatch, given, weights, rows):
    read, whole = [], Calibration.read
    monkeypatch.setattr(Calibration, "read", lambda self, *all: read.append(whole(self, *all)) or read[-1])
    sizes = ["--length", "16", "--examples", "8", "--evaluate", "2", "--batch_size", "1"]
    record = prune(small, tmp_path / "out", "--channels", "0.5", *sizes, "--data", json.dumps(two_texts), *given)
    named = [*two_texts, "mixed", "generated"] if weights else two_texts
    assert (record["calibration"]["sources"], record["calibration"]["weights"]) == (without_folders(named), weights)
    assert list(Counter(source_of(one) for one in read[0]).values()) == rows
    inside = {one["source"]: one["inside"] for one in record["degradation"]}
    supplement = {"mixed": True, "generated": True, "unseen": False} if weights else {"generated": False, "unseen": False}
    assert inside == {"one": True, "other": True, **supplement}


def test_with_what_the_model_writes_among_the_texts_shares_are_equal(small, two_texts, tmp_path):
    texts = ["generated", two_texts[0]]
    record = prune(small, tmp_path / "out", "--channels", "0.5", *SHORT, "--data", json.dumps(texts))
    assert (record["calibration"]["sources"], record["calibration"]["weights"]) == (without_folders(texts), None)
    assert {one["source"]: one["inside"] for one in record["degradation"]} == {"generated": True, "one": True, "unseen": False}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "nothing to remove: set a ratio"),
        (["--channels", "1.5"], r"channels=1.5 must be a fraction of these units in \[0, 1\)"),
        (
            ["--params", "10"],
            "params=10 \\(10\\) is out of reach. Reachable: [0-9,]+ to [0-9,]+\\. .*; did you mean 0.1\\?",
        ),
        (["--channels", "0.5", "--rounds", "0"], "rounds=0 must be a whole number of at least 1"),
        (["--channels", "0.5", "--supplement", "0.5"], "supplement=0.5 is a share next to text files, but data=None"),
        (
            ["--channels", "0.5", "--supplement", "0.5", "--data", "[a.txt, generated]"],
            r"supplement=0.5 is a share next to text files, but data=\['a.txt', 'generated'\]",
        ),
        (["--channels", "0.5", "--supplement", "1"], r"supplement=1.0 must be in \[0, 1\)"),
        (["--blocks", "-1"], "blocks=-1 must be a whole number of at least 0"),
        (["--channels", "0.5", "--evaluate", "-1"], "evaluate=-1 must be a whole number of at least 0"),
    ],
)
def test_refused_before_anything_is_written(small, tmp_path, arguments, match):
    with pytest.raises(SystemExit, match=match):
        main(["prune-structure", str(small), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
