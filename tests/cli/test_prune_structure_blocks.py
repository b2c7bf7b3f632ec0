"""`billhook prune-blocks`: from the shell to a checkpoint with fewer blocks."""

import json

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.main import main
from kit.cli import blocks, drawn, option, small_llama
from kit.printed import assert_printed
from kit.published import record_of

SHORT = ["--effort", "fast", "--length", "16", "--examples", "6", "--evaluate", "5", "--batch_size", "4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"), num_hidden_layers=3)


def test_the_block_of_the_least_influence_goes(small, files, tmp_path, capsys):
    out = tmp_path / "out"
    main(["prune-blocks", str(small), str(out), "--blocks", "1", *SHORT, *option(files)])
    record = record_of(out)
    plan = bh.plan(bh.load(small), batches=drawn(blocks(files["train"]), 4), blocks=1)
    assert record["plans"][0]["units"] == plan.units
    assert record["importance"]["blocks_by"] == "BlockInfluence()"
    assert record["perplexity"]["after"] > 0
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    assert_printed("prune-blocks", capsys.readouterr().out)


def test_a_fraction_of_those_that_are_not_protected_and_a_dry_run(small, files, tmp_path, capsys):
    ends = ["--first", "1", "--last", "1", "--importance", "Ablation", "--length", "16", "--examples", "2"]
    main(["prune-blocks", str(small), str(tmp_path / "out"), "--blocks", "0.4", *ends, "--dry_run", *option(files)])
    said = capsys.readouterr().out
    assert "model.layers  3 -> 2 blocks; without 1 (" in said
    assert f"Dry run: {tmp_path / 'out'} was not written." in said
    assert not (tmp_path / "out").exists()


def test_in_greedy_order(small, files, tmp_path, capsys):
    main(["prune-blocks", str(small), str(tmp_path / "out"), "--blocks", "2", "--greedy", *SHORT, *option(files)])
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    plan = bh.plan(bh.load(small), batches=drawn(blocks(files["train"]), 4), blocks=2, greedy=True)
    assert record["plans"] == json.loads(json.dumps([plan.to_json()]))
    assert record["importance"]["greedy"] is True
    assert "remove blocks one at a time: blocks=2 (importance: BlockInfluence())" in capsys.readouterr().out


@pytest.mark.daily("matched")
@pytest.mark.parametrize(
    "match", [[], ["--repair.match", "BlockMatching", "--repair.match.steps", "20"]], ids=["refitted", "matched"]
)
def test_blocks_behind_make_up_for_it(files, tmp_path, capsys, match):
    options = ["--last", "1", "--repair", "RepairConfig", *match, "--examples", "24", "--length", "64", "--evaluate", "5"]
    main(["prune-blocks", "tiny", str(tmp_path / "out"), "--blocks", "1", "--supplement", "0", *options, *option(files)])
    said, record = capsys.readouterr().out, record_of(tmp_path / "out")
    assert "refit output layers of blocks behind them by least squares" in said
    assert ("then reconstruct each block in 20 steps (takes about " in said) == bool(match)
    assert "RepairConfig(" in record["importance"]["repair"]
    assert ("BlockMatching(" in record["importance"]["repair"]) == bool(match)
    plain = bh.load("tiny")
    bh.apply(plain, bh.ModelPlan.from_json(record["plans"][0], plain))
    repaired = bh.load(tmp_path / "out")
    changed = {name for name, value in repaired.named_parameters() if not torch.equal(value, plain.get_parameter(name))}
    assert "model.layers.2.self_attn.o_proj.weight" in changed


def test_a_greedy_order_of_nothing_is_refused(small, tmp_path):
    with pytest.raises(SystemExit, match="greedy=True requires blocks to remove .blocks=None."):
        main(["prune-structure", str(small), str(tmp_path / "out"), "--greedy", "--channels", "0.5"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--blocks", "0"]])
def test_nothing_asked_for_is_refused(small, tmp_path, given):
    with pytest.raises(SystemExit, match=r"blocks=(None|0): pass the number of blocks to remove, or a fraction"):
        main(["prune-blocks", str(small), str(tmp_path / "out"), *given])
