"""Prune and convert Hugging Face transformers inside a PyTorch Lightning fit."""

# ruff: noqa: I001 - by theme

from typing import TYPE_CHECKING

from billhook import schedules as schedules

__version__ = "0.1.0"

if TYPE_CHECKING:
    from billhook.tracing.trace import trace as trace
    from billhook.units.find import find_units as find_units
    from billhook.units.gates import gates as gates, mask as mask

    from billhook.importance.score import score as score
    from billhook.importance.ablation import Ablation as Ablation, ablate_heads as ablate_heads
    from billhook.importance.activations import ActivationNorm as ActivationNorm, OutputNorm as OutputNorm
    from billhook.importance.baselines import WeightNorm as WeightNorm
    from billhook.importance.blocks import BlockInfluence as BlockInfluence
    from billhook.importance.gate_gradient import GateGradient as GateGradient
    from billhook.importance.obs import OBS as OBS
    from billhook.importance.taylor import Taylor as Taylor

    from billhook.calibration.calibration import Calibration as Calibration
    from billhook.calibration.generated import generated as generated

    from billhook.model.plan import ModelPlan as ModelPlan, apply as apply
    from billhook.pruning.amount import Amount as Amount
    from billhook.pruning.planning import plan as plan, plan_units as plan_units, prune_units as prune_units
    from billhook.pruning.repair import repair as repair
    from billhook.repairs.repair import RepairConfig as RepairConfig

    from billhook.sparsity.prune import prune as prune
    from billhook.sparsity.permute import permute_for as permute_for
    from billhook.sparsity.criteria import RIA as RIA, Magnitude as Magnitude, Wanda as Wanda
    from billhook.sparsity.sparsegpt import SparseGPT as SparseGPT
    from billhook.sparsity.alps import ALPS as ALPS
    from billhook.sparsity.alps import Refit as Refit
    from billhook.sparsity.allocation import OWL as OWL
    from billhook.sparsity.matching import BlockMatching as BlockMatching

    from billhook.kv_heads.convert import convert_kv_heads as convert_kv_heads
    from billhook.kv_heads.methods import Mean as Mean
    from billhook.kv_heads.methods import Aligned as Aligned
    from billhook.kv_heads.methods import SVD as SVD
    from billhook.kv_heads.methods import Auto as Auto

    from billhook.adapters.lora import LoRA as LoRA
    from billhook.adapters.masked import mask_adapters as mask_adapters
    from billhook.adapters.merge import merge as merge

    from billhook.checkpoints.save import load as load, save as save
    from billhook.model.streamed import stream as stream
    from billhook.fit.resume import ShapeInCheckpoint as ShapeInCheckpoint, load_from_checkpoint as load_from_checkpoint
    from billhook.shrinking.shrink import shrink as shrink
    from billhook.report.summary import summary as summary

    from billhook.callbacks import DepthPruning as DepthPruning, HeadPruning as HeadPruning
    from billhook.callbacks import KVHeadConversion as KVHeadConversion, Uptraining as Uptraining
    from billhook.callbacks import StructuredPruning as StructuredPruning, WeightPruning as WeightPruning, SRSTE as SRSTE
    from billhook.callbacks import Damage as Damage, Export as Export, Report as Report, Shrinking as Shrinking

    from billhook.training.module import TransformerModule as TransformerModule
    from billhook.training.data import TextDataModule as TextDataModule, ClassificationDataModule as ClassificationDataModule
    from billhook.training.images import ImageDataModule as ImageDataModule
    from billhook.training.evaluation import evaluate as evaluate
    from billhook.training.distillation import Distillation as Distillation

else:
    import importlib.util

    # what is above, imported when it is asked for: all together take seconds
    _PLACES = {
        "billhook.tracing.trace": "trace",
        "billhook.units.find": "find_units",
        "billhook.units.gates": "gates mask",
        "billhook.importance.score": "score",
        "billhook.importance.ablation": "Ablation ablate_heads",
        "billhook.importance.activations": "ActivationNorm OutputNorm",
        "billhook.importance.baselines": "WeightNorm",
        "billhook.importance.blocks": "BlockInfluence",
        "billhook.importance.gate_gradient": "GateGradient",
        "billhook.importance.obs": "OBS",
        "billhook.importance.taylor": "Taylor",
        "billhook.calibration.calibration": "Calibration",
        "billhook.calibration.generated": "generated",
        "billhook.model.plan": "ModelPlan apply",
        "billhook.pruning.amount": "Amount",
        "billhook.pruning.planning": "plan plan_units prune_units",
        "billhook.pruning.repair": "repair",
        "billhook.repairs.repair": "RepairConfig",
        "billhook.sparsity.prune": "prune",
        "billhook.sparsity.permute": "permute_for",
        "billhook.sparsity.criteria": "RIA Magnitude Wanda",
        "billhook.sparsity.sparsegpt": "SparseGPT",
        "billhook.sparsity.alps": "ALPS Refit",
        "billhook.sparsity.allocation": "OWL",
        "billhook.sparsity.matching": "BlockMatching",
        "billhook.kv_heads.convert": "convert_kv_heads",
        "billhook.kv_heads.methods": "Mean Aligned SVD Auto",
        "billhook.adapters.lora": "LoRA",
        "billhook.adapters.masked": "mask_adapters",
        "billhook.adapters.merge": "merge",
        "billhook.checkpoints.save": "load save",
        "billhook.model.streamed": "stream",
        "billhook.fit.resume": "ShapeInCheckpoint load_from_checkpoint",
        "billhook.shrinking.shrink": "shrink",
        "billhook.report.summary": "summary",
        "billhook.callbacks.depth_pruning": "DepthPruning",
        "billhook.callbacks.head_pruning": "HeadPruning",
        "billhook.callbacks.kv_heads": "KVHeadConversion",
        "billhook.callbacks.uptraining": "Uptraining",
        "billhook.callbacks.structured_pruning": "StructuredPruning",
        "billhook.callbacks.weight_pruning": "WeightPruning",
        "billhook.callbacks.srste": "SRSTE",
        "billhook.callbacks.damage": "Damage",
        "billhook.callbacks.export": "Export",
        "billhook.callbacks.report": "Report",
        "billhook.callbacks.shrinking": "Shrinking",
        "billhook.training.module": "TransformerModule",
        "billhook.training.data": "TextDataModule ClassificationDataModule",
        "billhook.training.images": "ImageDataModule",
        "billhook.training.evaluation": "evaluate",
        "billhook.training.distillation": "Distillation",
    }
    _WHERE = {name: place for place, names in _PLACES.items() for name in names.split()}
    __all__ = ["schedules", *_WHERE]

    def __getattr__(name: str) -> object:
        """Imports a public name; or all of them, where a folder is asked for, of which any part may be meant, or plans are.

        `ModelPlan.from_json` makes those of every kind that has been imported.
        """
        if name not in _WHERE and importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name not in _WHERE or name == "ModelPlan":
            for place in _PLACES:
                importlib.import_module(place)
        if name not in _WHERE:
            return importlib.import_module(f"{__name__}.{name}")
        globals()[name] = found = getattr(importlib.import_module(_WHERE[name]), name)
        return found

    def __dir__() -> list[str]:
        """Lists what is there, and what can be imported."""
        return sorted({*globals(), *__all__})
