"""Prune and convert Hugging Face transformers inside a PyTorch Lightning fit."""

from billhook.callbacks import Export, HeadPruning, KVHeadConversion, Report, WeightPruning
from billhook.checkpoint import load, save
from billhook.data import ClassificationDataModule, Seq2SeqDataModule, TextDataModule
from billhook.module import ShapeInCheckpoint, TransformerModule
from billhook.report import summary
from billhook.schedules import Constant, Cosine, Cubic, Exponential, Linear, MultiStep, Schedule
from billhook.sparsity.adapters import mask_adapters, unmask_adapters
from billhook.sparsity.allocation import OWL, Allocation, ByPattern, Uniform
from billhook.sparsity.criteria import RIA, Criterion, Magnitude, Random, SparseGPT, Wanda, WandaAlpha
from billhook.sparsity.merge import Merged, merge
from billhook.sparsity.prune import plan_pruning, prune
from billhook.sparsity.refit import Refit
from billhook.sparsity.result import Pruning
from billhook.structure.coupling import Structure
from billhook.structure.gates import HeadMask, head_gates, mask_heads
from billhook.structure.groups import Group
from billhook.structure.head_choice import choose_heads
from billhook.structure.head_plan import HeadPlan, plan_heads
from billhook.structure.head_removal import apply_heads, prune_heads
from billhook.structure.importance import Ablation, ActivationNorm, GateGradient, Importance, RandomUnits, Taylor, WeightNorm
from billhook.structure.kv_heads import convert_kv_heads
from billhook.structure.ranking import HeadAblation, ablate_heads, head_importance
from billhook.structure.trace import trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Ablation",
    "ActivationNorm",
    "Allocation",
    "ByPattern",
    "ClassificationDataModule",
    "Constant",
    "Cosine",
    "Criterion",
    "Cubic",
    "Exponential",
    "Export",
    "GateGradient",
    "Group",
    "HeadAblation",
    "HeadMask",
    "HeadPlan",
    "HeadPruning",
    "Importance",
    "KVHeadConversion",
    "Linear",
    "Magnitude",
    "Merged",
    "MultiStep",
    "OWL",
    "Pruning",
    "RIA",
    "Random",
    "RandomUnits",
    "Refit",
    "Report",
    "Schedule",
    "Seq2SeqDataModule",
    "ShapeInCheckpoint",
    "SparseGPT",
    "Structure",
    "Taylor",
    "TextDataModule",
    "TransformerModule",
    "Uniform",
    "Wanda",
    "WandaAlpha",
    "WeightNorm",
    "WeightPruning",
    "ablate_heads",
    "apply_heads",
    "choose_heads",
    "convert_kv_heads",
    "head_gates",
    "head_importance",
    "load",
    "mask_adapters",
    "mask_heads",
    "merge",
    "plan_heads",
    "plan_pruning",
    "prune",
    "prune_heads",
    "save",
    "summary",
    "trace",
    "unmask_adapters",
]
