"""Callbacks in transformers' Trainer change the model as they do in Lightning's, resume, and refuse what cannot be."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

import billhook as bh
from billhook.integrations.transformers import Callbacks
from kit import prunes
from kit.events import AFTER, END, EVENTS, FEW, Own, figures, loader
from kit.families import llama
from kit.fits import trainer

SETTINGS = {
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # Adam makes much of the last digit of a gradient
    "max_grad_norm": 0.0,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_strategy": "no",
}


class Ordered(Trainer):
    """Reads its data in order, as the loader of the other fit."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, self.args.per_device_train_batch_size))


class Plain(Own):
    """The module of the Lightning fit, whose optimizer is the Trainer's."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder, callbacks, model=None, resume=None, kind=Ordered, validation=None, **settings):
    """The model of a fit in transformers' Trainer."""
    model = Own().net if model is None else model
    args = TrainingArguments(str(folder / "hf"), **SETTINGS | settings)
    adapter = callbacks if isinstance(callbacks, Callbacks) else Callbacks(callbacks, validation)
    run = kind(model, args, train_dataset=loader().dataset, eval_dataset=loader().dataset, callbacks=[adapter])
    run.train(resume_from_checkpoint=resume)
    return model, run


def close(model, other):
    """Equal but for rounding."""
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, others[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("at", ["start", 2], ids=["start", "later"])
@pytest.mark.parametrize("event", EVENTS)
def test_events_are_those_of_lightning(tmp_path, event, at):
    callback, other, lit = EVENTS[event](at), EVENTS[event](at), Plain()
    model, _ = train(tmp_path, [callback], validation=loader(4, 4))
    trainer(tmp_path, [other], max_steps=4).fit(lit, loader(), loader(4, 4))
    assert figures(model) == figures(lit) == END[event]
    close(model, lit.net)
    assert [own["step"] for own in callback.events] == [0 if at == "start" else 2]
    for own, others in zip(callback.events, other.events, strict=True):
        assert own["what"] == others["what"]
        assert ("val_loss" in own["after"]) == ("val_loss" in others["after"]) == ((event, at) != ("mean", "start"))
        assert own["after"].get("val_loss", 0) == pytest.approx(others["after"].get("val_loss", 0), rel=1e-4)
