"""docs/deploy/export.md, run as it stands."""

import pytest
import torch

import billhook as bh
from kit.changed import asked, changed
from kit.pages import ROOT, blocks_in, run_page

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'billhook[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'billhook[onnx]'")
BLOCKS = [block for block in blocks_in(ROOT / "docs" / "deploy" / "export.md") if block.language == "python"]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def answers_alike(model, answer):
    """Compares logits for several numbers of rows and tokens, with padding; those of padding itself mean nothing."""
    for rows, length, padded in ((2, 12, 3), (3, 7, 2), (1, 20, 0)):
        inputs = asked(model, rows, length, padded)
        with torch.no_grad():
            expected = model(**inputs).logits
        seen = inputs["attention_mask"].bool() if expected.shape[:2] == (rows, length) else ...
        torch.testing.assert_close(answer(inputs)[seen], expected[seen], atol=1e-5, rtol=1e-4)
        assert expected[seen].std() > 0.02


def onnx(session):
    return lambda inputs: torch.from_numpy(session.run(["logits"], {name: one.numpy() for name, one in inputs.items()})[0])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
def test_what_the_page_exports_answers_as_the_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bh.save(changed(name), "pruned")
    page = run_page(BLOCKS, {})
    model = page["model"]
    assert "billhook" in model.config.to_dict()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(page["logits"]), model(**page["inputs"]).logits, atol=1e-5, rtol=1e-4)
    answers_alike(model, onnx(page["session"]))
    program = torch.export.load("pruned.pt2").module()
    answers_alike(model, lambda inputs: program(**inputs).logits)


def without_sdpa(model):
    model.set_attn_implementation("eager")
    model.decoder.config.use_cache = False


SETTINGS = {"experts": lambda model: model.set_experts_implementation("batched_mm"), "t5": without_sdpa}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_needs_another_setting_in_onnx(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = changed(name)
    SETTINGS[name](model)
    model.config.use_cache = False
    inputs = asked(model)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, free))
    page = run_page(BLOCKS[1:3], {"torch": torch, "program": program, "inputs": inputs})
    answers_alike(model, onnx(page["session"]))
