"""Trains a model that was cut, with the dense one as its teacher, before it is saved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.adapters.lora import LoRA
from billhook.adapters.merge import merge
from billhook.arguments import number, whole
from billhook.checkpoints.pretrained import Task
from billhook.fit.run import isolated
from billhook.report.generation import generates
from billhook.training.distillation import Distillation
from billhook.training.module import TransformerModule

RATE, ADAPTER_RATE = 1e-4, 1e-3
"""The highest learning rate, of all weights and of LoRA."""


@dataclass(frozen=True)
class Recovery:
    """Training after the cut, on the same texts (more of them than were calibrated on, if there are), taught by the dense model.

    Args:
        recover: Steps of training; 0 for none.
        recover_lr: The highest learning rate; by default 1e-4, or 1e-3 of LoRA.
        recover_lora: Train LoRA, which is merged in the end, in the place of all weights.
        recover_batch_size: Examples in a step.

    Raises:
        ValueError: If a number is out of range.
    """

    recover: int = 0
    recover_lr: float | None = None
    recover_lora: bool = False
    recover_batch_size: int = 2

    def __post_init__(self) -> None:
        whole("recover", self.recover, 0)
        whole("recover_batch_size", self.recover_batch_size)
        if self.recover_lr is not None:
            number("recover_lr", self.recover_lr, above=0)

    @property
    def examples(self) -> int:
        """How many examples it takes."""
        return self.recover * self.recover_batch_size

    def task_of(self, model: PreTrainedModel) -> Task:
        """Returns the task of a model; refuses one that cannot be trained here."""
        if "SequenceClassification" in type(model).__name__:
            return "sequence-classification"
        if not generates(model):
            raise ValueError(
                f"recover={self.recover}: a {type(model).__name__} is no causal language model and no classifier of texts: train "
                "it in a LightningModule of your own, with `Shrinking` among the callbacks"
            )
        return "causal-lm"

    def train(
        self,
        model: PreTrainedModel,
        teacher: str,
        loader: DataLoader[Any],
        device: torch.device,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Trains a model in place, in float32.

        Args:
            model: The model that was cut.
            teacher: The name of the dense model.
            loader: Batches with labels.
            device: Where it is trained.
            seed: Decides the order of the examples, dropout, and how LoRA begins.
            progress: Called with how many steps are done, and of how many.
        """
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        with isolated():
            torch.manual_seed(seed)
            module = TransformerModule(
                model,
                self.task_of(model),
                lr=self.recover_lr or (ADAPTER_RATE if self.recover_lora else RATE),
                warmup=0.1,
                lora=LoRA() if self.recover_lora else None,
                distillation=Distillation(teacher=teacher),
            )
            _trainer(self.recover, device, progress).fit(module, loader, val_dataloaders=[])
        if self.recover_lora:
            merge(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        model.to(device).eval()  # type: ignore[arg-type]


class _Progress(pl.Callback):
    """Tells how many steps are done."""

    def __init__(self, told: Callable[[int, int], None]) -> None:
        self.told = told

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Tells it after each step."""
        self.told(trainer.global_step, trainer.max_steps)


def _trainer(steps: int, device: torch.device, progress: Callable[[int, int], None]) -> pl.Trainer:
    """Makes a trainer that shows and writes nothing."""
    return pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[_Progress(progress)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
