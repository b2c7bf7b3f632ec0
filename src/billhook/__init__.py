"""Prune and convert Hugging Face transformers inside a PyTorch Lightning fit."""

from billhook import schedules as schedules
from billhook.adapters.lora import LoRA
from billhook.adapters.masked import mask_adapters, unmask_adapters
from billhook.adapters.merge import Merged, merge
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
from billhook.checkpoints.save import load, save
from billhook.fit.resume import ShapeInCheckpoint, load_from_checkpoint
from billhook.importance.ablation import Ablation, HeadAblation, ablate_heads
from billhook.importance.activations import ActivationNorm, OutputNorm
from billhook.importance.base import Importance
from billhook.importance.baselines import RandomUnits, WeightNorm
from billhook.importance.blocks import block_importance
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.obs import OBS
from billhook.importance.score import head_importance, unit_importance
from billhook.importance.taylor import Taylor
from billhook.kv_heads.convert import convert_kv_heads
from billhook.kv_heads.equal_parameters import equal_parameters
from billhook.pruning.amount import Amount
from billhook.pruning.block_choice import greedy_blocks
from billhook.pruning.block_plan import BlockPlan, plan_blocks
from billhook.pruning.block_removal import apply_blocks, prune_blocks
from billhook.pruning.choice import choose_heads
from billhook.pruning.heads import plan_heads, prune_heads
from billhook.pruning.plan import Plan, plan_from_json, plan_units
from billhook.pruning.removal import apply
from billhook.pruning.repair import repair
from billhook.pruning.request import plan
from billhook.repairs.repair import Repair
from billhook.report.speed import measure_speed
from billhook.report.summary import summary
from billhook.sparsity.allocation import OWL, Allocation, ByPattern, Uniform
from billhook.sparsity.criteria import RIA, Criterion, Magnitude, Random, Wanda, WandaAlpha
from billhook.sparsity.prune import prune
from billhook.sparsity.refit import Refit
from billhook.sparsity.sparsegpt import SparseGPT
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group
from billhook.tracing.trace import trace
from billhook.training.data import ClassificationDataModule, Seq2SeqDataModule, TextDataModule
from billhook.training.distillation import Distillation
from billhook.training.module import TransformerModule
from billhook.units.blocks import find_blocks
from billhook.units.channels import find_units
from billhook.units.gates import HeadMask, head_gates, mask_heads
from billhook.units.units import Units

__version__ = "0.1.0.dev0"

__all__ = [
    "Ablation",
    "ActivationNorm",
    "Allocation",
    "Amount",
    "BlockPlan",
    "ByPattern",
    "ClassificationDataModule",
    "Criterion",
    "DepthPruning",
    "Distillation",
    "Export",
    "GateGradient",
    "Group",
    "HeadAblation",
    "HeadMask",
    "Plan",
    "HeadPruning",
    "Importance",
    "KVHeadConversion",
    "LoRA",
    "Magnitude",
    "Merged",
    "OBS",
    "OWL",
    "OutputNorm",
    "RIA",
    "Random",
    "RandomUnits",
    "Refit",
    "Repair",
    "Report",
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
    "plan_units",
    "prune",
    "prune_blocks",
    "prune_heads",
    "repair",
    "save",
    "schedules",
    "summary",
    "trace",
    "unit_importance",
    "unmask_adapters",
]
