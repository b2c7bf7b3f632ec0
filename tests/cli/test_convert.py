"""`billhook convert`: from the shell to a checkpoint with fewer KV heads."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.main import main
from kit.cli import blocks, drawn, option, perplexity, small_llama, tokenizer
from kit.printed import assert_printed
from kit.published import record_of

SHORT = ["--effort", "fast", "--length", "16", "--examples", "6", "--evaluate", "5", "--batch_size", "3"]
IDS = torch.arange(40).view(2, 20)


def convert(model, out, *arguments):
    main(["convert", str(model), str(out), *arguments])
    return record_of(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


def test_by_svd_with_perplexity_before_and_after(small, files, tmp_path, capsys):
    how = ["--num_key_value_heads", "1", "--method", "svd", "--supplement", "0"]
    record = convert(small, tmp_path / "out", *how, *SHORT, *option(files))
    dense, held_out = bh.load(small), blocks(files["validation"])[:5]
    assert record["perplexity"]["before"] == pytest.approx(perplexity(dense, held_out), rel=1e-4)
    plan = bh.convert_kv_heads(dense, 1, "svd", drawn(blocks(files["train"]), 3))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.num_key_value_heads == 1
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, dense(IDS).logits)
    assert record["perplexity"]["after"] == pytest.approx(perplexity(again, held_out), rel=1e-4)
    assert record["plans"] == [plan.to_json()]
    assert [(one["source"], one["inside"]) for one in record["degradation"]] == [
        ("train", True),
        ("generated", False),
        ("unseen", False),
    ]
    assert record["calibration"]["sources"] == {split: Path(path).name for split, path in files.items()}
    what = record["events"][0]["what"]
    assert what.startswith("4 -> 1 KV heads in 2 attention modules (svd; rotary frequencies stay)")
    assert f"- {what}\n" in (tmp_path / "out" / "README.md").read_text()
    assert_printed("convert", capsys.readouterr().out)


def test_the_screen_says_which_method_was_taken_and_how_the_frequencies_change(files, tmp_path, capsys):
    record = convert("tiny", tmp_path / "out", "--num_key_value_heads", "1", "--supplement", "0", *SHORT, *option(files))
    said = capsys.readouterr().out
    pattern = r"Method: auto: (\S+)\n  distances on held-out batches: mean [\d.]+, aligned [\d.]+, svd [\d.]+\n"
    how = re.search(pattern, said)
    assert how.group(1) == "svd"
    assert re.search(r"\n  angles change by up to [\d.]+ radians over 512 tokens, .*\n  rope_type: default -> longrope\n", said)
    assert record["events"][0]["what"].endswith("; rope_type: default -> longrope)")


def test_the_longest_text_is_told_in_one_option(files, tmp_path, capsys):
    how = ["--num_key_value_heads", "1", "--supplement", "0", "--method", "svd", *SHORT, *option(files)]
    record = convert("tiny", tmp_path / "out", *how, "--context", "64")
    assert re.search(r"\n  angles change by up to [\d.]+ radians over 64 tokens, ", capsys.readouterr().out)
    dense = bh.load("tiny")
    plan = bh.convert_kv_heads(dense, 1, bh.kv_methods.SVD(context=64), drawn(blocks(files["train"]), 3))
    assert record["plans"] == [plan.to_json()]
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "out")(IDS).logits, dense(IDS).logits)


def test_a_method_that_needs_no_data_is_calibrated_on_none(small, tmp_path, capsys):
    record = convert(small, tmp_path / "out", "--num_key_value_heads", "2", "--length", "16", "--evaluate", "2")
    dense = bh.load(small)
    bh.convert_kv_heads(dense, 2)
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "out")(IDS).logits, dense(IDS).logits)
    measured = [(one["source"], one["inside"]) for one in record["degradation"]]
    assert measured == [("mixed", False), ("generated", False), ("unseen", False)]
    assert "calibration" not in record
    said = capsys.readouterr().out
    assert "convert 4 KV heads to 2 in 2 attention modules (method: mean)\n  no calibration data needed\n" in said
    assert "on 2 examples per text (--data FILE uses your text)\n" in said
    assert "method='svd' starts much closer" in said


def test_some_layers_by_a_class_with_settings_and_repaired(small, files, tmp_path, capsys):
    how = ["--method", "Aligned", "--method.grouping", "similar", "--layers", "1", "--repair", "RepairConfig"]
    record = convert(small, tmp_path / "out", "--num_key_value_heads", "2", *how, *SHORT, *option(files))
    assert record["plans"][0]["layers"] == ["model.layers.1.self_attn"]
    assert record["events"][0]["what"].endswith("in 1 attention modules (aligned, similar heads grouped, repaired)")
    assert record["repair"].startswith("RepairConfig(")
    assert "  refit attention output projections and MLPs by least squares\n" in capsys.readouterr().out


def test_a_model_that_writes_nothing_needs_no_data(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=2048, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    record = convert(tmp_path / "t5", tmp_path / "out", "--num_key_value_heads", "2")
    assert record["perplexity"]["before"] is None
    assert "4 -> 2 KV heads in 2 attention modules" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="data=None: T5ForConditionalGeneration does not generate .*Pass a file"):
        main(["convert", str(tmp_path / "t5"), str(tmp_path / "two"), "--num_key_value_heads", "2", "--method", "svd"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "Pass num_key_value_heads, such as 1 for multi-query attention, or kv_cache_bytes"),
        (["--num_key_value_heads", "0"], "num_key_value_heads=0 must be a whole number of at least 1"),
        (["--num_key_value_heads", "3"], "num_key_value_heads=3 must be smaller than 4 and divide .* Use 1, 2"),
        (["--num_key_value_heads", "1", "--method", "first", "--repair", "RepairConfig"], "repair goes with method 'mean'"),
        (["--num_key_value_heads", "1", "--context", "64"], "context=64 needs method=svd, got mean. Add --method svd"),
        (["--num_key_value_heads", "1", "--layers", "[7]"], "layers: there is no 7; there are 0 to 1"),
    ],
)
def test_refused_before_anything_is_measured(small, tmp_path, monkeypatch, arguments, match):
    for name in ("batches", "measure"):
        monkeypatch.setattr(f"billhook.cli.one_shot.OneShot.{name}", lambda self: pytest.fail("too late"))
    with pytest.raises(SystemExit, match=match):
        main(["convert", str(small), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_means_that_round_to_zero_are_no_sparsity_that_training_would_undo(tmp_path, capsys):
    record = convert("tiny", tmp_path / "out", "--num_key_value_heads", "2", "--length", "16", "--evaluate", "1")
    event = record["events"][0]
    assert event["after"]["zeros"] > event["before"]["zeros"]
    assert "\n  billhook fit --model.model " in capsys.readouterr().out
