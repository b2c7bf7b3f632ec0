"""An event of a user's own: the class that `docs/methods/custom.md` shows."""

import importlib
from pathlib import Path

import pytest
import torch

import billhook as bh
from kit.events import Own, loader
from kit.fits import same, trainer, weights
from kit.pages import blocks_in

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "custom.md"


@pytest.fixture
def event(tmp_path, monkeypatch):
    code = next(block.code for block in blocks_in(PAGE) if "class RoundWeights" in block.code)
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("my_methods").RoundWeights


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_it_happens_once_is_recorded_and_survives_a_resume(tmp_path, event):
    straight, callback = Own(), event(bits=4, at=2)
    trainer(tmp_path, [callback, bh.Report(str(tmp_path / "report.png"))], max_steps=4).fit(straight, loader(), loader(4, 4))
    (recorded,) = callback.events
    assert (recorded["step"], recorded["what"], recorded["by"]["bits"]) == (2, "4 bits", 4)
    assert recorded["before"]["val_loss"] != recorded["after"]["val_loss"]
    stopped, resumed = Own(), Own()
    run = trainer(tmp_path, [event(bits=4, at=2)], max_steps=3)
    run.fit(stopped, loader(), loader(4, 4))
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    again = event(bits=4, at=2)
    trainer(tmp_path, [again], max_steps=4).fit(resumed, loader(), loader(4, 4), ckpt_path=tmp_path / "stopped.ckpt")
    assert same(weights(resumed), weights(straight))
    assert [done["step"] for done in again.events] == [2]


def test_it_changes_what_it_says(event):
    model = bh.load("tiny", "float32")
    event(bits=3).round(model, [])
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert max(len(torch.unique(row)) for row in weight) <= 7  # -3 to 3
