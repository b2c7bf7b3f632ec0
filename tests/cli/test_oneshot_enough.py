"""Commands choose units on as many examples as settle it, say so, and repair and measure on all."""

import json

import pytest
import torch

import billhook as bh
from billhook.calibration.enough import interleaved
from billhook.cli.main import main
from billhook.engine.batches import Batch
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


TOO_FEW = ["--examples", "4", "--length", "5", "--evaluate", "0", "--generated", "0"]
FEW_TOKENS = "--examples 4, --length 5: too few tokens for any refit"
SEARCH = ["--generations", "0", "--importance", "WeightNorm"]
CUTS = {"shrink": ["--params", "0.9", *SEARCH], "prune-structure": ["--channels", "0.5"]}


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("shrink", TOO_FEW, f"{FEW_TOKENS}: 15 are fitted to, and model.layers.0.self"),
        ("shrink", ["--examples", "2", *TOO_FEW[2:]], "--examples, --length and --batch_size: three rows at least, .*; got 2"),
        (
            "prune-structure",
            TOO_FEW,
            f"{FEW_TOKENS}: 20 are fitted to, and model.layers.0.mlp",
        ),
        ("prune-structure", ["--examples", "1", *TOO_FEW[2:]], "--examples 1: a refit needs two at least, .*; got 1"),
        ("convert", TOO_FEW, f"{FEW_TOKENS}: 20 are fitted to, and model.layers.0.self"),
        ("convert", ["--examples", "1", *TOO_FEW[2:]], "--examples 1: repair needs 2 at least"),
        (
            "prune",
            ["--examples", "1", *TOO_FEW[2:]],
            "--examples 1: match needs 2 at least",
        ),
    ],
)
def test_too_few_examples_are_refused_before_the_work(small, files, tmp_path, monkeypatch, command, given, says, dry):
    for name in ("batches", "measure"):
        monkeypatch.setattr(f"billhook.cli.oneshot.frame.OneShot.{name}", lambda self: pytest.fail("too late"))
    cuts = CUTS | {"convert": ["--num_key_value_heads", "1", "--repair", "{}"], "prune": ["--sparsity", "0.5", "--match", "{}"]}
    must = ["--repair", "Repair"] if command in ("shrink", "prune-structure") else []
    with pytest.raises(SystemExit, match=says):
        main([command, str(small), str(tmp_path / "out"), *cuts[command], *must, *given, *dry, *option(files)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "tokens", "after", "how"),
    [("prune-structure", 20, "LlamaForCausalLM", "importance"), ("shrink", 15, "KL to the dense model", "shrink")],
)
def test_what_is_not_refitted_is_said_before_the_work_and_stands_in_the_record_and_the_card(
    small, files, tmp_path, capsys, command, tokens, after, how
):
    words = f"not repaired: {FEW_TOKENS}: {tokens} are fitted to"
    main([command, str(small), str(tmp_path / "dry"), *CUTS[command], *TOO_FEW, *option(files), "--dry_run"])
    assert words in capsys.readouterr().out
    record = run(command, small, tmp_path / "out", *CUTS[command], *TOO_FEW, *option(files))
    said = capsys.readouterr().out
    assert said.index(words) < said.index(after)
    assert "refit the linears" not in said
    assert record[how]["repair"] is None
    left = record["events"][0]["not_refitted"]
    assert left.startswith("not repaired: too few tokens that count for any refit")
    assert f"\n  - {left}\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("criterion", "few"), [("SparseGPT", True), ("Wanda", False)])
def test_few_tokens_for_a_criterion_that_solves_for_weights_are_said_before_the_work(
    small, files, tmp_path, monkeypatch, capsys, criterion, few
):
    monkeypatch.setattr("billhook.cli.oneshot.prune.prune_weights", lambda *given, **how: pytest.fail("too late"))
    how = ["--sparsity", "0.5", "--criterion", criterion, "--dry_run", *TOO_FEW, *option(files)]
    with pytest.raises(pytest.fail.Exception):
        main(["prune", str(small), str(tmp_path / "out"), *how])
    assert (
        "fewer tokens than inputs come to 14 linears, such as model.layers.0.mlp.down_proj, 20 for 48" in capsys.readouterr().out
    ) is few


def test_one_batch_of_several_examples_is_enough(small, files, tmp_path):
    how = ["--channels", "0.5", "--repair", "Repair", "--examples", "8", "--length", "16", "--evaluate", "0", "--generated", "0"]
    assert run("prune-structure", small, tmp_path / "out", *how, *option(files))["importance"]["repair"]


def test_a_search_is_not_lost_where_what_it_chose_cannot_be_refitted(small, files, tmp_path, capsys):
    """Fifteen rows of two tokens are enough for 24 of 32 inputs of attentions, and too few for 42 of 48 channels."""
    how = ["--params", "0.97", "--examples", "16", "--length", "2", *TOO_FEW[4:], *SEARCH, "--layers", "free", "--round_to", "1"]
    with pytest.warns(UserWarning, match="too few tokens"):
        record = run("shrink", small, tmp_path / "out", *how, *option(files))
    said, left = capsys.readouterr().out, record["shrink"]["not_refitted"]
    assert "cut and not refitted: linears that keep more inputs than there are tokens to fit to, " in said
    assert left == record["events"][0]["not_refitted"]
    assert left in said
    assert f"\n  - {left}\n" in (tmp_path / "out" / "README.md").read_text()
