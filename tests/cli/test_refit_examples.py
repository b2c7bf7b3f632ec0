"""Commands say before the work where there are too few examples, and what is not refitted."""

import json
import re

import pytest

from billhook.cli.main import main
from kit.cli import option, small_llama


def run(command, model, out, *arguments):
    main([command, str(model), str(out), *arguments])
    return json.loads((out / "billhook.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


TOO_FEW = ["--examples", "4", "--length", "5", "--evaluate", "0", "--supplement", "0"]
FEW_TOKENS = "--examples 4 --length 5 gives"
SEARCH = ["--generations", "0", "--importance", "WeightNorm"]
CUTS = {"shrink": ["--params", "0.92", *SEARCH], "prune-structure": ["--channels", "0.5"]}


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("shrink", TOO_FEW, rf"{FEW_TOKENS} 15 tokens, and model\.layers\.0\.self\S* needs at least \d+"),
        (
            "prune-structure",
            TOO_FEW,
            rf"{FEW_TOKENS} 20 tokens, and model\.layers\.0\.mlp\S* needs at least \d+",
        ),
        (
            "prune-structure",
            ["--examples", "1", *TOO_FEW[2:]],
            "repair needs at least 2 examples, to choose the ridge penalty, got 1",
        ),
        ("convert", TOO_FEW, rf"{FEW_TOKENS} 20 tokens, and model\.layers\.0\.self\S* needs at least \d+"),
        (
            "prune",
            ["--examples", "1", *TOO_FEW[2:]],
            "--examples 1 is too few: match needs at least 2",
        ),
    ],
)
def test_too_few_examples_are_refused_before_the_work(small, files, tmp_path, monkeypatch, command, given, says):
    for name in ("batches", "measure"):
        monkeypatch.setattr(f"billhook.cli.one_shot.OneShot.{name}", lambda self: pytest.fail("too late"))
    cuts = CUTS | {
        "convert": ["--num_key_value_heads", "1", "--method", "mean", "--repair", "RepairConfig"],
        "prune": ["--sparsity", "0.5", "--match", "{}"],
    }
    must = ["--repair", "RepairConfig"] if command in ("shrink", "prune-structure") else []
    with pytest.raises(SystemExit, match=says):
        main([command, str(small), str(tmp_path / "out"), *cuts[command], *must, *given, *option(files)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "tokens", "after", "how"),
    [("prune-structure", 20, "LlamaForCausalLM", "importance"), ("shrink", 15, "KL divergence from the dense model", "shrink")],
)
def test_what_is_not_refitted_is_said_before_the_work_and_stands_in_the_record_and_the_card(
    small, files, tmp_path, capsys, command, tokens, after, how
):
    words = f"no repair: {FEW_TOKENS} {tokens} tokens, and model.layers.0."
    main([command, str(small), str(tmp_path / "dry"), *CUTS[command], *TOO_FEW, *option(files), "--dry_run"])
    assert words in capsys.readouterr().out
    record = run(command, small, tmp_path / "out", *CUTS[command], *TOO_FEW, *option(files))
    said = capsys.readouterr().out
    assert said.index(words) < said.index(after)
    assert "refit consumer layers" not in said
    assert record[how]["repair"] is None
    left = record["events"][0]["not_refitted"]
    assert re.match(r"not repaired: repair of \S+ needs at least \d+ non-padding tokens", left)
    assert f"\n  - {left}\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("criterion", "few"), [("SparseGPT", True), ("Wanda", False)])
def test_few_tokens_for_a_criterion_that_solves_for_weights_are_said_before_the_work(
    small, files, tmp_path, monkeypatch, capsys, criterion, few
):
    monkeypatch.setattr("billhook.cli.prune.prune_weights", lambda *given, **how: pytest.fail("too late"))
    how = ["--sparsity", "0.5", "--criterion", criterion, "--dry_run", *TOO_FEW, *option(files)]
    with pytest.raises(pytest.fail.Exception):
        main(["prune", str(small), str(tmp_path / "out"), *how])
    assert (
        "14 linear layers have fewer calibration tokens than inputs, such as model.layers.0.mlp.down_proj (20 for 48)"
        in capsys.readouterr().out
    ) is few


def test_one_batch_of_several_examples_is_enough(small, files, tmp_path):
    how = ["--channels", "0.5", "--repair", "RepairConfig", "--evaluate", "0", "--supplement", "0"]
    how += ["--examples", "8", "--length", "16"]
    assert run("prune-structure", small, tmp_path / "out", *how, *option(files))["importance"]["repair"]


def test_a_search_is_not_lost_where_what_it_chose_cannot_be_refitted(small, files, tmp_path, capsys):
    """Fifteen rows of two tokens are enough for 24 of 32 inputs of attentions, and too few for 42 of 48 channels."""
    how = ["--params", "0.97", "--examples", "16", "--length", "2", *TOO_FEW[4:], *SEARCH, "--layers", "free", "--round_to", "1"]
    with pytest.warns(UserWarning, match="too few tokens"):
        record = run("shrink", small, tmp_path / "out", *how, *option(files))
    said, left = capsys.readouterr().out, record["shrink"]["not_refitted"]
    layers = r"no repair of up to \d+ of \d+ consumer layers"
    assert re.search(rf"{layers}: they keep more inputs than there are calibration tokens \([\d,]+\)", said)
    assert left == record["events"][0]["not_refitted"]
    assert left in said
    assert f"\n  - {left}\n" in (tmp_path / "out" / "README.md").read_text()
