"""`billhook shrink`: from the shell to the best smaller checkpoint."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.examples import Examples
from billhook.cli.main import main
from billhook.cli.one_shot import OneShot
from kit.cli import blocks, option, small_llama, tokenizer
from kit.cli import pytestmark as quiet
from kit.printed import assert_printed
from kit.published import record_of
from kit.shaped import bert

pytestmark = quiet

SHORT = ["--polish", "null", "--length", "16", "--examples", "24", "--evaluate", "4", "--batch_size", "4"]
SHORT += ["--generations", "1", "--candidates", "2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


def test_a_budget_with_its_record_and_picture(small, files, tmp_path, capsys, monkeypatch):
    picture, shown = tmp_path / "curve.png", list[tuple[int, int, str]]()

    @contextmanager
    def noted(what, unit="", suffix=None, steady=True):
        yield lambda done, total: shown.append((done, total, suffix())) if what == "shrinking" else None

    monkeypatch.setattr("billhook.cli.shrink.progress_bar", noted)
    main(["shrink", str(small), str(tmp_path / "out"), "--params", "0.95", "--plot", str(picture), *SHORT, *option(files)])
    record = record_of(tmp_path / "out")
    dense = bh.load(small)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.num_parameters() == record["shrink"]["left"] <= 0.95 * dense.num_parameters()
    plan = bh.ModelPlan.from_json(record["shrink"]["plan"], dense)
    bh.apply(dense, plan)
    with torch.no_grad():
        ids = blocks(files["train"])[:2]
        assert dense(ids).logits.shape == again(ids).logits.shape
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert str(plan).splitlines()[0] in said
    assert_printed("shrink", said)
    assert record["degradation"]
    assert f"- without {plan.words}: {record['shrink']['left']:,} params (budget" in (tmp_path / "out" / "README.md").read_text()
    assert record["shrink"]["layers"] == "uniform"
    assert shown[0] == (0, shown[0][1], "scoring")  # how many there are is known from the start
    assert shown[0][1] > 0
    phases = list(dict.fromkeys(phase.split()[0] for *_, phase in shown))
    assert phases == ["scoring", "refitting", "measuring", "searching", "repairing"]
    assert re.fullmatch(r"repairing the selected model, (\d+) of \1 layers", shown[-1][2])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            ["--params", "0.95"],
            [
                "params now 146,592, budget 139,262",
                "self_attn: keep 4, 2 or 1 KV heads (in each of 2)",
                "blocks that may be removed: 1",
            ],
        ),
        (
            ["--max_loss", "1.1"],
            ["budget max_loss=1.1, smallest reachable", "model.layers.*.mlp: keep 48, ", "channels (in each of 2)"],
        ),
    ],
)
def test_a_dry_run_says_what_a_search_may_try_and_measures_nothing(small, tmp_path, monkeypatch, capsys, budget, words):
    for name in ("batches", "measure"):
        monkeypatch.setattr(f"billhook.cli.one_shot.OneShot.{name}", lambda self: pytest.fail("too late"))
    main(["shrink", str(small), str(tmp_path / "out"), *budget, "--dry_run"])
    said = capsys.readouterr().out
    assert [word for word in (*words, f"Dry run: {tmp_path / 'out'} was not written.") if word not in said] == []
    assert not (tmp_path / "out").exists()


def test_a_budget_in_quality(small, files, tmp_path, capsys):
    options = ["--max_loss", "1.5", "--importance", "WeightNorm", "--repair", "null"]
    main(["shrink", str(small), str(tmp_path / "out"), *options, *SHORT, *option(files)])
    record, said = json.loads((tmp_path / "out" / "billhook.json").read_text()), capsys.readouterr().out
    assert record["shrink"]["ratio"] <= 1.5
    assert bh.load(tmp_path / "out").num_parameters() == record["shrink"]["left"] < bh.load(small).num_parameters()
    assert f"; perplexity {record['shrink']['ratio']:.4f}x the dense model's\n" in said


def test_whole_blocks_are_in_the_record_the_table_and_the_card(small, files, tmp_path, capsys):
    options = ["--params", "0.92", "--importance", "WeightNorm", "--repair", "null"]
    dense = bh.load(small)
    with torch.no_grad():  # one block computes nothing
        dense.model.layers[1].mlp.down_proj.weight.zero_()
        dense.model.layers[1].self_attn.o_proj.weight.zero_()
    dense.save_pretrained(tmp_path / "idle")
    tokenizer().save_pretrained(tmp_path / "idle")
    main(["shrink", str(tmp_path / "idle"), str(tmp_path / "out"), *options, *SHORT, *option(files)])
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert 1 in record["shrink"]["blocks"]["units"]["model.layers"]
    for name in ("plan", "blocks"):
        bh.apply(dense, bh.ModelPlan.from_json(record["shrink"][name], dense))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        n: v.shape for n, v in dense.state_dict().items()
    }
    words = "1 of 2 blocks: "
    assert words in (tmp_path / "out" / "README.md").read_text()
    assert "2 -> 1 blocks; without 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "Budget requires exactly one of params, bytes, max_loss; got none"),
        (["--params", "0.001"], "params=0.001 (146) is out of reach. Reachable: "),
        (["--params", "0.9", "--recover", "-1"], "recover=-1 must be a whole number of at least 0"),
        (["--params", "0.9", "--recover", "2", "--recover_lr", "0"], "recover_lr=0.0 must be a number above 0"),
        (
            ["--params", "0.9", "--max_loss", "1.1"],
            "Budget requires exactly one of params, bytes, max_loss; got params and max_loss",
        ),
        (["--params", "0.9", "--variant_cache", __file__], "test_shrink_command.py' is a file. Pass a folder."),
        (["--params", "0.9", "--seed", "-1"], "seed=-1 must be a whole number of at least 0"),
        (["--params", "0.9", "--plot", "curve.gif"], "plot='curve.gif' must be a .png file"),
    ],
)
def test_what_is_refused_writes_nothing(small, files, tmp_path, options, says):
    with pytest.raises(SystemExit) as refusal:
        main(["shrink", str(small), str(tmp_path / "out"), *options, *SHORT, *option(files)])
    assert says in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """A model whose predictions suffer when it is cut."""
    folder = small_llama(tmp_path_factory.mktemp("sure"))
    model = bh.load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
    model.save_pretrained(folder)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("trained", "given", "nearer"),
    [("all weights", ["--recover_lr", "1e-3"], 1.2), ("LoRA", ["--recover_lora", "--dtype", "bfloat16"], 1.05)],
)
def test_recovery_by_distillation(sure, files, tmp_path, capsys, trained, given, nearer):
    options = ["--params", "0.94", "--recover", "20", "--recover_batch_size", "8", *given]
    torch.manual_seed(3)
    main(["shrink", str(sure), str(tmp_path / "out"), *options, *SHORT, *option(files)])
    assert int(torch.randint(1000, ())) == int(torch.randint(1000, (), generator=torch.Generator().manual_seed(3)))
    record, said = json.loads((tmp_path / "out" / "billhook.json").read_text()), capsys.readouterr().out
    recovery, after = record["recovery"], record["degradation"]
    assert recovery["recover"] == 20
    assert recovery["before"][0]["kl"] > nearer * after[0]["kl"]
    assert said.index("Before recovery training:") < said.index(f"Polish: {trained} polished in 20 steps")
    assert said.count("perplexity on") == 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.num_parameters() == record["shrink"]["left"]
    assert again.dtype == (torch.bfloat16 if trained == "LoRA" else torch.float32)


@pytest.mark.nightly
def test_a_classifier_recovers(classifier, tmp_path, capsys):
    model, data = classifier
    main(["shrink", str(model), str(tmp_path / "out"), "--params", "0.95", "--recover", "3", *SHORT, *data])
    record, said = json.loads((tmp_path / "out" / "billhook.json").read_text()), capsys.readouterr().out
    assert re.findall(r"^Accuracy|accuracy (?=before and)", said, re.MULTILINE) == ["accuracy ", "Accuracy", "Accuracy"]
    assert 0 <= record["recovery"]["before"] <= 1
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(bert(vocab_size=2048, num_labels=2).config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for split, count in {"train": 16, "test": 4}.items():
        lines = [json.dumps({"text": "a rose " * (number % 5 + 1), "label": number % 2}) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder, option({split: folder / f"{split}.jsonl" for split in ("train", "test")})


def test_what_is_measured_is_not_trained_on(small, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number * 7919 % 1000} roses and {number * 104729 % 997} thorns. " for number in range(80)))
    given = Examples(data=str(text), also=[], length=16, examples=6, evaluate=5, batch_size=2)
    work = OneShot(str(small), str(tmp_path / "out"), given)
    batches, before = work.batches(), work.measure()
    rows = {tuple(batch["input_ids"][0].tolist()) for batch in work.training_batches(1000, batches, before)}
    measured = {tuple(ids.tolist()) for source, ids in before.rows if source == "text"}
    assert len(measured) == 5
    assert rows == {tuple(ids.tolist()) for ids in blocks(text)} - measured
    limit_tokens = {tuple(batch["input_ids"][0].tolist()) for batch in work.training_batches(8, batches, before)}
    assert len(limit_tokens) >= 8
    assert limit_tokens > {tuple(ids.tolist()) for batch in batches for ids in batch["input_ids"]}
