"""`bh.evaluate` measures what the command does, and the formula."""

import json
import math
from pathlib import Path

import pytest
import torch

import billhook as bh
from billhook.assets import model_path
from billhook.cli.main import main
from billhook.model.preprocessors import load_tokenizer
from kit.fits import write_text
from kit.shaped import bert

QUESTIONS = [
    {"context": "Enter the", "choices": ["king", "window of it"], "label": 0},
    {"context": "To be or not", "choices": ["whom", "to be"], "label": 1},
    {"context": "My lord, I", "choices": ["am", "the"], "label": 0},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return {"text": write_text(folder)["validation"], "questions": str(folder / "asked.jsonl")}


@pytest.fixture(scope="module")
def model():
    return bh.load("tiny", dtype="float32")


def test_perplexity_is_that_of_all_next_tokens(model, files):
    found = bh.evaluate(model.train(), str(files["text"]), length=32, examples=3)
    assert model.training
    ids = load_tokenizer("tiny")(Path(files["text"]).read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: 3 * 32]).view(3, 32)
    with torch.no_grad():
        logits = model.eval()(rows).logits[:, :-1].double().log_softmax(-1)
    expected = math.exp(-logits.gather(-1, rows[:, 1:, None]).mean())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.accuracy == {}
    assert f"{found.perplexity:,.3f}" in str(found)


def test_it_is_what_the_command_measures(model, files, tmp_path):
    found = bh.evaluate(model, str(files["text"]), [files["questions"]], length=32, examples=3)
    given = ["tiny", "--data", files["questions"], "--text", str(files["text"]), "--length", "32", "--examples", "3"]
    main(["evaluate", *given, "--dtype", "float32", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    (told,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [(one["of"], one["measure"], one["value"]) for one in told["figures"]] == [
        (one.of, one.measure, pytest.approx(one.value)) for one in found.figures
    ]
    assert found.accuracy.keys() == {"asked (3)"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "text=None requires questions"),
        ({"text": "a.txt", "length": 1}, "length=1 must be"),
        ({"text": "a.txt", "length": 10**6}, "length=1000000 must be in 2"),
        ({"text": "a.txt", "examples": 0}, "examples=0"),
        ({"questions": ["nowhere.jsonl"]}, "^questions: the file 'nowhere.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        bh.evaluate(model, **arguments)


def test_models_that_predict_no_next_token_are_refused():
    with pytest.raises(ValueError, match="is not a causal language model"):
        bh.evaluate(bert(), "a.txt", tokenizer=str(model_path("tiny")))
