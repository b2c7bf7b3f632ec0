"""What is done aside of training logs nothing, within a validation too."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from billhook.fit.calibration import FitCalibration
from billhook.fit.lightning import LightningFit
from billhook.fit.measure import validating


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("own", [False, True], ids=["its class's", "its own"])
def test_who_is_asked_last_is_asked_first_no_longer(own):
    module, logged, lines = Module(), [], SimpleNamespace(metrics={})
    record = lambda *given: logged.append(given)  # noqa: E731
    if own:
        vars(module)["log"] = record
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(state=SimpleNamespace(stage="fit"), strategy=strategy)
    lines = type("Lines", (), {"metrics": {}, "__call__": lambda self, *given: logged.append(("lines", *given))})()
    with FitCalibration().undisturbed(LightningFit(trainer, module)):
        module.log("a", 1)
        with validating(trainer, module, lines):
            module.log("b", 2)
        module.log("c", 3)
    assert logged == [("lines", "b", 2)]
    assert vars(module).get("log") is (record if own else None)
