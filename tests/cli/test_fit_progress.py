"""How far a fit is: no epochs that there are not in its bar, and lines where nobody looks at a bar."""

import io
import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from billhook.cli import fit as command
from billhook.cli.fit import BillhookCLI
from kit.cli import pytestmark as quiet

pytestmark = quiet


def trainer(folder, **given):
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    return command.replace_progress_bar(pl.Trainer(max_steps=10, default_root_dir=folder, limit_val_batches=0, **plain, **given))


@pytest.fixture
def stdout(monkeypatch):
    """What is written to stdout, which is a terminal or none, and a clock that goes on by ten seconds each time."""

    def of(terminal):
        out = io.StringIO()
        out.isatty = lambda: terminal
        clock = itertools.count(0, 10)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr(command.time, "monotonic", lambda: float(next(clock)))
        return out

    return of


def test_a_log_gets_lines_with_step_loss_and_time(tmp_path, stdout):
    out, fit = stdout(terminal=False), trainer(tmp_path)
    module = BoringModel()
    module.training_step = lambda batch: {"loss": module.layer(batch).sum() * 0 + 2.5}
    fit.fit(module, DataLoader(torch.ones(64, 32)))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert lines == ["step 2 of 10, loss 2.5, about 80 s left", "step 8 of 10, loss 2.5, about 20 s left"]


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, stdout):
    stdout(terminal=True)
    fit = trainer(tmp_path)
    assert not any(isinstance(one, command.ProgressLines) for one in fit.callbacks)
    (bar,) = [one for one in fit.callbacks if isinstance(one, RichProgressBar)]
    assert fit.progress_bar_callback is bar
    bar.setup(fit, BoringModel(), "fit")
    assert bar._get_train_description(3).strip() == "Epoch 3"
    fit.fit_loop.max_epochs = 5
    assert bar._get_train_description(3).strip() == "Epoch 3/4"


@pytest.mark.parametrize("given", [{"enable_progress_bar": False}, {"callbacks": [TQDMProgressBar()]}])
def test_what_a_user_says_of_the_bar_holds(tmp_path, stdout, given):
    stdout(terminal=False)
    fit = trainer(tmp_path, **given)
    assert not any(isinstance(one, command.ProgressLines | RichProgressBar) for one in fit.callbacks)


def test_the_command_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {"run": False, "subclass_mode_model": True, "subclass_mode_data": True, "auto_configure_optimizers": False}
    made = BillhookCLI(pl.LightningModule, pl.LightningDataModule, **parts, args=["--trainer.max_steps", "1"]).trainer
    assert type(made.progress_bar_callback) is command.ProgressBar
