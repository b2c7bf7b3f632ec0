"""`billhook shrink`: from the shell to the best smaller checkpoint."""

import json

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli.main import main
from kit.cli import blocks, option, small_llama

SHORT = ["--length", "16", "--examples", "24", "--evaluate", "4", "--batch_size", "4", "--generations", "1", "--candidates", "2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


def test_a_budget_with_its_record_and_picture(small, files, tmp_path, capsys):
    picture = tmp_path / "curve.png"
    main(["shrink", str(small), str(tmp_path / "out"), "--params", "0.95", "--plot", str(picture), *SHORT, *option(files)])
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    dense = bh.load(small)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.num_parameters() == record["shrink"]["left"] <= 0.95 * dense.num_parameters()
    plan = bh.Plan.from_json(record["shrink"]["plan"], dense)
    bh.apply(dense, plan)
    with torch.no_grad():
        ids = blocks(files["train"])[:2]
        assert dense(ids).logits.shape == again(ids).logits.shape
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert str(plan).splitlines()[0] in said
    assert "KL to the dense model by size" in said
    assert "perplexity" in said
    assert record["damage"]
    assert f"- without {plan.words}: {record['shrink']['left']:,} params left" in (tmp_path / "out" / "README.md").read_text()
    assert record["shrink"]["layers"] == "uniform"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "params=None: give one budget"),
        (["--params", "0.001"], "cannot be reached"),
        (["--params", "0.9", "--plot", "curve.gif"], "plot='curve.gif' must be a file that ends in .png"),
    ],
)
def test_what_is_refused_writes_nothing(small, files, tmp_path, options, says):
    with pytest.raises(SystemExit) as refusal:
        main(["shrink", str(small), str(tmp_path / "out"), *options, *SHORT, *option(files)])
    assert says in str(refusal.value)
    assert not (tmp_path / "out").exists()
