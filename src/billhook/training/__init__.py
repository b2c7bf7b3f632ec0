"""LightningModule, data modules, LoRA adapters, distillation, and checkpoints."""

from billhook.adapters.lora import LoRA
from billhook.adapters.masked import mask_adapters
from billhook.adapters.merge import merge
from billhook.fit.resume import ShapeInCheckpoint, load_from_checkpoint
from billhook.training.data import ClassificationDataModule, TextDataModule
from billhook.training.distillation import Distillation
from billhook.training.images import ImageDataModule
from billhook.training.module import TransformerModule
from billhook.training.targets import Targets

__all__ = [
    "ClassificationDataModule", "Distillation", "ImageDataModule", "LoRA", "ShapeInCheckpoint", "Targets",
    "TextDataModule", "TransformerModule", "load_from_checkpoint", "mask_adapters", "merge",
]  # fmt: skip
