"""Prune and convert Hugging Face transformers inside a PyTorch Lightning fit."""

from billhook.callbacks import Export, KVHeadConversion, Report
from billhook.checkpoint import load, save
from billhook.data import ClassificationDataModule, Seq2SeqDataModule, TextDataModule
from billhook.module import ShapeInCheckpoint, TransformerModule
from billhook.report import summary
from billhook.schedules import Constant, Cosine, Cubic, Exponential, Linear, MultiStep, Schedule
from billhook.structure.coupling import Structure
from billhook.structure.groups import Group
from billhook.structure.kv_heads import convert_kv_heads
from billhook.structure.trace import trace

__version__ = "0.1.0.dev0"

__all__ = [
    "ClassificationDataModule",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Export",
    "Group",
    "KVHeadConversion",
    "Linear",
    "MultiStep",
    "Report",
    "Schedule",
    "Seq2SeqDataModule",
    "ShapeInCheckpoint",
    "Structure",
    "TextDataModule",
    "TransformerModule",
    "convert_kv_heads",
    "load",
    "save",
    "summary",
    "trace",
]
