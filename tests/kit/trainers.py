"""Fits of a small model in transformers' Trainer, whose data comes in order."""

from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from billhook.integrations.transformers import Callbacks
from kit.events import Own, loader

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


def train(folder, callbacks, model=None, resume=None, others=(), validation=None, **settings):
    """The model of a fit in transformers' Trainer."""
    model = Own().net if model is None else model
    args = TrainingArguments(str(folder / "hf"), **SETTINGS | settings)
    adapters = [Callbacks(callbacks, validation), *others]
    run = Ordered(model, args, train_dataset=loader().dataset, eval_dataset=loader().dataset, callbacks=adapters)
    run.train(resume_from_checkpoint=resume)
    return model, run


def calibration():
    """Batches that exist before training."""
    return [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in loader().dataset]
