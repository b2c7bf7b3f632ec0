"""Prune and convert Hugging Face transformers inside a PyTorch Lightning fit."""

from billhook.callbacks import (
    DepthPruning,
    Export,
    HeadPruning,
    KVHeadConversion,
    Report,
    StructuredPruning,
    Uptraining,
    WeightPruning,
)
from billhook.checkpoint import load, save
from billhook.data import ClassificationDataModule, Seq2SeqDataModule, TextDataModule
from billhook.distillation import Distillation
from billhook.lora import LoRA
from billhook.module import TransformerModule
from billhook.report import summary
from billhook.resume import ShapeInCheckpoint, load_from_checkpoint
from billhook.schedules import Constant, Cosine, Cubic, Exponential, Linear, MultiStep, Schedule
from billhook.sparsity.adapters import mask_adapters, unmask_adapters
from billhook.sparsity.allocation import OWL, Allocation, ByPattern, Uniform
from billhook.sparsity.criteria import RIA, Criterion, Magnitude, Random, SparseGPT, Wanda, WandaAlpha
from billhook.sparsity.merge import Merged, merge
from billhook.sparsity.prune import plan_pruning, prune
from billhook.sparsity.refit import Refit
from billhook.sparsity.result import Pruning
from billhook.speed import measure_speed
from billhook.structure.ablation import Ablation
from billhook.structure.activations import ActivationNorm, OutputNorm
from billhook.structure.amount import Amount
from billhook.structure.block_plan import BlockPlan, plan_blocks
from billhook.structure.block_ranking import block_importance, greedy_blocks
from billhook.structure.block_removal import apply_blocks, prune_blocks
from billhook.structure.channels import find_units
from billhook.structure.coupling import Structure
from billhook.structure.equal_parameters import equal_parameters
from billhook.structure.gates import HeadMask, head_gates, mask_heads
from billhook.structure.groups import Group
from billhook.structure.head_choice import choose_heads
from billhook.structure.head_plan import plan_heads
from billhook.structure.head_removal import prune_heads
from billhook.structure.importance import GateGradient, Importance, RandomUnits, WeightNorm
from billhook.structure.kv_heads import convert_kv_heads
from billhook.structure.layers import find_blocks
from billhook.structure.plan import Plan, plan_from_json, plan_units
from billhook.structure.plan_repair import repair
from billhook.structure.planning import plan
from billhook.structure.ranking import HeadAblation, ablate_heads, head_importance, unit_importance
from billhook.structure.removal import apply
from billhook.structure.repair import Repair
from billhook.structure.surgeon import OBS
from billhook.structure.taylor import Taylor
from billhook.structure.trace import trace
from billhook.structure.units import Units

__version__ = "0.1.0.dev0"

__all__ = [
    "Ablation",
    "ActivationNorm",
    "Allocation",
    "Amount",
    "BlockPlan",
    "ByPattern",
    "ClassificationDataModule",
    "Constant",
    "Cosine",
    "Criterion",
    "Cubic",
    "DepthPruning",
    "Distillation",
    "Exponential",
    "Export",
    "GateGradient",
    "Group",
    "HeadAblation",
    "HeadMask",
    "Plan",
    "HeadPruning",
    "Importance",
    "KVHeadConversion",
    "Linear",
    "LoRA",
    "Magnitude",
    "Merged",
    "MultiStep",
    "OBS",
    "OWL",
    "OutputNorm",
    "Pruning",
    "RIA",
    "Random",
    "RandomUnits",
    "Refit",
    "Repair",
    "Report",
    "Schedule",
    "Seq2SeqDataModule",
    "ShapeInCheckpoint",
    "SparseGPT",
    "Structure",
    "StructuredPruning",
    "Taylor",
    "TextDataModule",
    "TransformerModule",
    "Uniform",
    "Units",
    "Uptraining",
    "Wanda",
    "WandaAlpha",
    "WeightNorm",
    "WeightPruning",
    "ablate_heads",
    "apply_blocks",
    "apply",
    "block_importance",
    "choose_heads",
    "convert_kv_heads",
    "equal_parameters",
    "find_units",
    "find_blocks",
    "greedy_blocks",
    "head_gates",
    "head_importance",
    "load",
    "load_from_checkpoint",
    "mask_adapters",
    "mask_heads",
    "measure_speed",
    "merge",
    "plan_from_json",
    "plan",
    "plan_blocks",
    "plan_heads",
    "plan_pruning",
    "plan_units",
    "prune",
    "prune_blocks",
    "prune_heads",
    "repair",
    "save",
    "summary",
    "trace",
    "unit_importance",
    "unmask_adapters",
]
