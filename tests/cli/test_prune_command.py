"""`billhook prune`: from the shell to a checkpoint."""

import json
import math

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.main import main
from kit.cli import small_llama
from kit.fits import write_text
from kit.printed import assert_printed
from kit.published import record_of

SHORT = ["--effort", "fast", "--length", "16", "--examples", "6", "--evaluate", "5"]


@pytest.fixture
def data(tmp_path):
    files = write_text(tmp_path)
    return ["--data", "{" + ", ".join(f"{split}: {path}" for split, path in files.items()) + "}"]


def ids_of(path, length, count):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bh.load("tiny").name_or_path)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    return [torch.tensor([ids[i * length : (i + 1) * length]]) for i in range(count)]


@torch.no_grad()
def perplexity(model, blocks):
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in blocks]
    return math.exp(sum(losses) / len(losses))


def test_a_checkpoint_with_half_of_the_weights_and_its_perplexity(tmp_path, data, capsys):
    main(["prune", "tiny", str(tmp_path / "out"), "--sparsity", "0.5", *data, *SHORT])
    said = capsys.readouterr().out
    model, dense = bh.load(tmp_path / "out"), bh.load("tiny")
    record = record_of(tmp_path / "out")
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            assert torch.equal((linear.weight == 0).sum(1), torch.full([len(linear.weight)], linear.weight.shape[1] // 2))
    held_out = ids_of(tmp_path / "validation.txt", 16, 5)
    assert record["perplexity"]["before"] == pytest.approx(perplexity(dense, held_out), rel=1e-5)
    assert record["perplexity"]["after"] == pytest.approx(perplexity(model, held_out), rel=1e-5)
    assert record["pruned"] == {
        "criterion": "Wanda(compares='row')",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "sequential": "block",
    }
    assert f"{record['perplexity']['before']:,.4g}  {record['perplexity']['after']:,.4g}" in said
    assert [(one["source"], one["inside"], one["rows"]) for one in record["degradation"]] == [
        ("train", True, 5),
        ("generated", False, 5),
        ("unseen", False, 5),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    (event,) = record["events"]
    assert f"- {event['what']}\n" in card
    assert event["what"].startswith("Wanda(compares='row'), unstructured: sparsity 0.5000 in ")
    assert (event["before"]["params"], event["after"]["params"]) == (dense.num_parameters(), model.num_parameters())
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert f"| zero parameters | {event['before']['zeros']:,} | {zeros:,} |" in card
    for one in record["degradation"]:
        costs = f"{one['before']:,.4g} | {one['after']:,.4g} | {one['ratio']:.3f} ± {one['ratio_error']:.3f} | {one['kl']:.3f} ±"
        assert f"| {one['source']} | {'' if one['inside'] else 'not '}calibrated on | {costs}" in card
    assert f"| pruned | criterion {record['pruned']['criterion']}; pattern unstructured; sparsity 0.5; sequential block |" in card
    sources = "sources (train train.txt; validation validation.txt)"
    assert f"| calibration | {sources}; tokens 96; length 16; " in card
    assert f"| versions | billhook {bh.__version__}; " in card
    assert "tags:\n- billhook\n- pruned\n- sparse\n" in card
    assert_printed("prune", said)


def test_settings_of_criteria_and_allocations(tmp_path, data, capsys):
    line = ["prune", "tiny", str(tmp_path / "out"), *data, *SHORT]
    main([*line, "--pattern", "2:4", "--criterion", "SparseGPT", "--criterion.damping", "0.1", "--sequential", "layer"])
    assert "SparseGPT(damping=0.1, block_size=128), 2:4" in capsys.readouterr().out
    weight = bh.load(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    assert ((weight.view(-1, 4) != 0).sum(1) <= 2).all()
    main([*line, "--sparsity", "0.5", "--allocation", "OWL", "--skip", "*.k_proj", "--evaluate", "0"])
    said = capsys.readouterr().out
    assert "k_proj" not in said
    assert "perplexity" not in said
    assert " to 0.5" in said


def test_blocks_are_matched(tmp_path, data, capsys):
    line = ["prune", "tiny", str(tmp_path / "out"), *data, *SHORT, "--sparsity", "0.5", "--criterion", "Magnitude"]
    main([*line, "--match", "{}", "--batch_size", "1"])
    said = capsys.readouterr().out
    assert "  reconstruct each block in 5 steps (takes about 5.5 calibration passes and 0.1 MB)\n" in said
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert record["pruned"]["match"].startswith("BlockMatching(steps=None, ")


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, data, capsys):
    main(["prune", "tiny", str(tmp_path / "out"), "--sparsity", "0.5", "--skip", "*.mlp.*", "--dry_run", *data, *SHORT])
    said = capsys.readouterr().out
    _, plan, last = said.split("\n\n")
    assert plan.startswith(
        "Wanda(compares='row'), unstructured\n  model.layers.*.self_attn.q_proj     4 x [   256,    256]  sparsity 0.5"
    )
    assert "mlp" not in plan
    assert last.startswith(f"Dry run: {tmp_path / 'out'} was not written.\n")
    assert not (tmp_path / "out").exists()


def test_a_sparsity_that_is_rounded_down_is_said(tmp_path, capsys):
    small = small_llama(tmp_path / "small")
    main(["prune", str(small), str(tmp_path / "out"), "--sparsity", "0.6", "--dry_run", "--data", "tiny", *SHORT])
    assert "(rounded down from 0.6 to whole weights)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity=1.5 must be a fraction"),
        ([], "sparsity=None requires an N:M pattern"),
        (["--sparsity", "0.3", "--pattern", "2:4"], "sparsity=0.3 contradicts pattern='2:4'"),
        (["--sparsity", "0.5", "--length", "100000"], "length=100000 must be from 2 to 512"),
        (["--sparsity", "0.5", "--also", "{there}/train.txt"], "also: 'train' is the name of another text"),
        (["--sparsity", "0.5", "--examples", "0"], "examples=0 must be a whole number of at least 1"),
        (["--sparsity", "0.5", "--skip", "nothing", *SHORT], "skip='nothing' matches none"),
    ],
)
def test_refusals_write_nothing(tmp_path, data, arguments, message):
    (tmp_path / "train.txt").write_text("Other text.\n")
    arguments = [word.format(there=tmp_path) for word in arguments]
    with pytest.raises(SystemExit, match=message):
        main(["prune", "tiny", str(tmp_path / "out"), *data, *arguments])
    assert not (tmp_path / "out").exists()


def test_of_a_model_that_predicts_no_next_token_there_is_no_perplexity(tmp_path, data, capsys):
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(bh.load("tiny").name_or_path).save_pretrained(tmp_path / "bert")
    main(["prune", str(tmp_path / "bert"), str(tmp_path / "out"), "--sparsity", "0.5", *data, *SHORT])
    said = capsys.readouterr().out
    assert "bert.encoder.layer.*.output.dense" in said
    assert "perplexity" not in said
