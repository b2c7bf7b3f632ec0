"""Recovery training of the smaller model that `billhook shrink` has found."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.adapters.lora import LoRA
from billhook.adapters.merge import merge
from billhook.checkpoints.pretrained import Task
from billhook.fit.run import isolated_rng
from billhook.progress import OnProgress
from billhook.training.distillation import Distillation
from billhook.training.module import TransformerModule

LR, LORA_LR = 1e-4, 1e-3
"""Default peak learning rates of recovery training: of all weights, and of LoRA."""


def recover(
    model: PreTrainedModel,
    task: Task,
    steps: int,
    lr: float | None,
    lora: bool,
    teacher: str,
    loader: DataLoader[Any],
    device: torch.device,
    seed: int,
    progress: OnProgress,
) -> None:
    """Trains a model in place, in float32.

    Args:
        model: The smaller model.
        task: The training task.
        steps: Number of training steps.
        lr: Peak learning rate. Defaults to 1e-4, or 1e-3 with LoRA.
        lora: If True, trains LoRA adapters and merges them.
        teacher: Name of the dense model.
        loader: Batches with labels.
        device: Device to train on.
        seed: Seed for the order of examples, dropout, and the initial LoRA weights.
        progress: Callback with the number of finished steps and the total.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    with isolated_rng():
        torch.manual_seed(seed)
        module = TransformerModule(
            model,
            task,
            lr=lr or (LORA_LR if lora else LR),
            warmup=0.1,
            lora=LoRA() if lora else None,
            distillation=Distillation(teacher=teacher),
        )
        trainer = pl.Trainer(  # prints and writes nothing
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[LambdaCallback(on_train_batch_end=lambda trainer, *_: progress(trainer.global_step, steps))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, val_dataloaders=[])
    if lora:
        merge(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    model.to(device).eval()  # type: ignore[arg-type]
