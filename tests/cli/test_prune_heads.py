"""`billhook prune-heads`: from the shell to a checkpoint."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.main import main
from billhook.importance.baselines import RandomUnits
from billhook.pruning.choice import choose
from billhook.units.find import find_units
from kit import fits
from kit.cli import blocks, drawn, option, perplexity, tokenizer
from kit.printed import assert_printed
from kit.published import record_of
from kit.shaped import bert

SHORT = ["--effort", "fast", "--length", "16", "--examples", "6", "--evaluate", "5", "--batch_size", "4"]
LABELS = 3


def prune(model, out, *arguments):
    main(["prune-heads", str(model), str(out), *arguments])
    return record_of(out)


def heads_of(model):
    return [one.count() for one in find_units(model, "head").values()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama with eight heads in each of two layers, beside the tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    fits.llama(vocab_size=2048, num_key_value_heads=8).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def label_of(model, text):
    return int(model(**tokenizer()(text, return_tensors="pt")).logits.argmax())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A BERT with large weights, so that heads matter."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("classifier")
    model = transformers.BertForSequenceClassification(bert(vocab_size=2048, num_labels=LABELS).config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory, classifier):
    """Texts with labels, as CSV: those that the classifier gives, but for each fifth."""
    folder, words, files = tmp_path_factory.mktemp("table"), fits.WORDS.split(), {}
    model = bh.load(classifier).eval()
    for split, count in (("train", 24), ("validation", 4), ("test", 21)):
        files[split] = str(folder / f"{split}.csv")
        with open(files[split], "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(count):
                text = " ".join(words[i % 11 : i % 11 + 1 + i % 6])
                writer.writerow([text, (label_of(model, text) + (i % 5 == 0)) % LABELS])
    return files


def test_tiny_with_fewer_heads_and_its_perplexity(files, tmp_path, capsys):
    record = prune("tiny", tmp_path / "out", "--ratio", "0.5", *option(files), *SHORT)
    said = capsys.readouterr().out
    model, dense = bh.load(tmp_path / "out"), bh.load("tiny")
    assert [2 * count for count in heads_of(model)] == heads_of(dense)
    held_out = blocks(files["validation"])[:5]
    assert record["perplexity"] == {
        "before": pytest.approx(perplexity(dense, held_out), rel=1e-5),
        "after": pytest.approx(perplexity(model, held_out), rel=1e-5),
        "examples": 5,
    }
    assert record["importance"] == {"by": "GateGradient(each='token')", "ranking": "layer", "per": "head", "rounds": 1}
    named = {"sources": {split: Path(file).name for split, file in files.items()}, "tokenizer": None}
    assert record["calibration"] | {"tokenizer": None} == asdict(bh.Calibration(files, None, 6 * 16, 16, batch_size=4)) | named
    importance = bh.score(
        dense, bh.find_units(dense, "head"), bh.importance.GateGradient(), drawn(blocks(files["train"]), 4), normalize=True
    )
    assert record["heads"] == choose(bh.find_units(dense, "head"), importance, 0.5)
    plan = bh.pruning.prune_units(dense, record["heads"])
    assert str(plan) in said
    assert f"{record['perplexity']['before']:,.4g}" in said
    assert_printed("prune-heads", said)
    with torch.no_grad():
        assert torch.equal(model(held_out).logits, dense(held_out).logits)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(plain(held_out).logits, dense(held_out).logits)


def test_a_dry_run_prints_what_would_be_done_and_writes_nothing(small, files, tmp_path, capsys):
    main(["prune-heads", str(small), str(tmp_path / "out"), "--ratio", "0.5", "--dry_run", *option(files), *SHORT])
    prune(small, tmp_path / "done", "--ratio", "0.5", *option(files), *SHORT)
    _, dry, done = capsys.readouterr().out.split(f"Model: {small} (")
    plan = bh.pruning.prune_units(bh.load(small), json.loads((tmp_path / "done" / "billhook.json").read_text())["heads"])
    assert f"\n\n{plan.text()}\n\nDry run: {tmp_path / 'out'} was not written.\n" in dry
    assert f"\n{plan.text()}\n" in done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ranking", "per", "importance"), [("layer", "head", "Taylor"), ("global", "kv_head", "GateGradient")])
def test_rounds(small, files, tmp_path, ranking, per, importance):
    """Scores are taken anew with the heads masked that have been chosen."""
    rounds = ["--rounds", "3", "--ranking", ranking, "--per", per, "--importance", importance, "--seed", "3"]
    record = prune(small, tmp_path / "out", "--ratio", "0.5", *rounds, *option(files), *SHORT)
    model, gone = bh.load(small), {}
    batches = drawn(blocks(files["train"]), 4, seed=3)
    for number in (1, 2, 3):
        with bh.mask(model, gone, per=per):
            scores = bh.score(
                model, bh.find_units(model, "head"), getattr(bh.importance, importance)(), batches, normalize=True, per=per
            )
        for name, own in gone.items():
            scores[name][own] = -1
        gone = choose(bh.find_units(model, "head"), scores, number / 6, ranking=ranking, per=per)
    assert record["heads"] == gone
    assert record["importance"]["rounds"] == 3
    assert sum(heads_of(bh.load(tmp_path / "out"))) == 8
    loads = transformers.AutoModelForCausalLM.from_pretrained
    if ranking == "layer":
        assert loads(tmp_path / "out").config.num_attention_heads == 4


def test_settings(small, files, tmp_path, capsys):
    """Those that are not the default's, one after the other into one folder."""
    run = [small, tmp_path / "out", "--ratio", "0.4", *option(files), *SHORT]
    record = prune(*run, "--importance", "RandomUnits", "--importance.seed", "5", "--evaluate", "0", "--normalize", "false")
    assert record["perplexity"] == {"before": None, "after": None, "examples": 0}
    assert "Calibration data" not in capsys.readouterr().out  # the plan has named it
    scores = bh.score(bh.load(small), bh.find_units(bh.load(small), "head"), RandomUnits(5))
    assert record["heads"] == choose(bh.find_units(bh.load(small), "head"), scores, 0.4)
    record = prune(*run, "--ranking", "global", "--min_heads", "4", "--importance", "WeightNorm", "--dtype", "bfloat16")
    model = bh.load(tmp_path / "out")
    assert min(heads_of(model)) >= 4
    assert sum(heads_of(model)) == 10
    assert model.dtype == torch.bfloat16


def test_a_classifier_and_its_accuracy(classifier, table, tmp_path, capsys):
    line = ["--ratio", "0.75", *option(table), "--examples", "10", "--batch_size", "4", "--evaluate", "17", "--rounds", "2"]
    line += ["--effort", "fast"]
    record = prune(classifier, tmp_path / "out", *line)
    dense, model = (bh.load(folder).eval() for folder in (classifier, tmp_path / "out"))
    assert type(model) is transformers.BertForSequenceClassification
    assert heads_of(model) == [1, 1]
    with open(table["test"]) as file:
        every = [(row["text"], int(row["label"])) for row in csv.DictReader(file)]
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:17]
    rows = [every[number] for number in drawn]
    expected = [sum(label_of(one, text) == label for text, label in rows) / 17 for one in (dense, model)]
    assert expected[0] == 12 / 17 > expected[1]
    assert record["accuracy"] == {"before": pytest.approx(expected[0]), "after": pytest.approx(expected[1]), "examples": 17}
    assert record["calibration"]["length"] == 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| accuracy | {expected[0]:,.4g} | {expected[1]:,.4g} |" in card
    assert "- without 6 heads in 2 attention modules\n" in card
    said = capsys.readouterr().out
    assert f"Accuracy: {expected[0]:,.4g} before, {expected[1]:,.4g} after" in said
    assert "calibrate on 10 examples (source: train.csv, split 'train')\n" in said
    assert (
        "Calibration data: train.csv, split 'train', 10 examples\nEvaluation data: test.csv, split 'test', 17 examples\n" in said
    )
    bh.pruning.prune_units(dense, record["heads"])
    batch = tokenizer()(rows[5][0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits)


@pytest.mark.nightly
def test_labels_that_are_words_are_numbered_as_the_classifier_does(classifier, table, tmp_path, capsys):
    names = ["some", "none", "all"]
    model = bh.load(classifier)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "named")
    tokenizer().save_pretrained(tmp_path / "named")
    worded = {}
    for split, path in table.items():
        worded[split] = str(tmp_path / f"{split}.csv")
        with open(path) as source, open(worded[split], "w", newline="") as target:
            rows = [{"text": row["text"], "label": names[int(row["label"])]} for row in csv.DictReader(source)]
            writer = csv.DictWriter(target, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    line = ["--ratio", "0.5", "--examples", "8"]
    record = prune(tmp_path / "named", tmp_path / "out", *line, *option(worded))
    assert record["accuracy"] == prune(classifier, tmp_path / "same", *line, *option(table))["accuracy"]
    assert bh.load(tmp_path / "out").config.id2label == dict(enumerate(names))
    capsys.readouterr()
    record = prune(tmp_path / "named", tmp_path / "alone", *line, "--data", worded["train"])
    assert record["accuracy"]["before"] is not None
    assert "Evaluation data: train.csv, split 'validation', 2 examples\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"ratio=None: pass the fraction of heads to remove, in \[0, 1\), with --ratio"),
        (["--ratio", "1"], r"ratio=1.0 must be a fraction of the heads in \[0, 1\)"),
        (["--ratio", "0.5", "--min_heads", "0"], "min_heads=0 must be a whole number of at least 1"),
        (
            ["--ratio", "0.9", "--min_heads", "2"],
            "would remove 7 of 8 heads of model.layers.0.self_attn. At most 6 can be removed",
        ),
        (["--ratio", "0.1"], "ratio=0.1 is less than one head of a layer"),
        (["--ratio", "0.5", "--rounds", "0"], "rounds=0 must be a whole number of at least 1"),
        (["--ratio", "0.5", "--length", "100"], "length=100 must be from 2 to 64"),
        (["--ratio", "0.5", "--column", "content"], "'train' .*content"),
    ],
)
def test_refusals_write_nothing(small, files, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["prune-heads", str(small), str(tmp_path / "out"), *option(files), *arguments])
    assert not (tmp_path / "out").exists()


def test_text_beside_labels_is_refused(classifier, table, tmp_path):
    with pytest.raises(
        SystemExit, match=r"supplement=0.5: BertForSequenceClassification needs labels, so it takes no other text"
    ):
        main(["prune-heads", str(classifier), str(tmp_path / "out"), "--ratio", "0.5", "--supplement", "0.5", *option(table)])
    assert not (tmp_path / "out").exists()
