"""Prune and convert Hugging Face transformers while training them with PyTorch Lightning.

Further names are in `criteria`, `importance`, `kv_methods`, `pruning`, and `training`.
"""

# ruff: noqa: I001 - by theme

from typing import TYPE_CHECKING

from billhook import schedules as schedules

__version__ = "0.1.0"

if TYPE_CHECKING:
    from billhook import criteria as criteria, importance as importance, kv_methods as kv_methods, pruning as pruning
    from billhook import training as training

    from billhook.checkpoints.save import load as load, save as save
    from billhook.model.streamed import stream as stream
    from billhook.report.summary import summary as summary
    from billhook.report.verdict import Limits as Limits, verdict as verdict
    from billhook.training.evaluation import evaluate as evaluate

    from billhook.tracing.trace import trace as trace
    from billhook.units.find import find_units as find_units
    from billhook.units.gates import gates as gates, mask as mask
    from billhook.importance.score import score as score
    from billhook.importance.activations import OutputNorm as OutputNorm
    from billhook.importance.obs import OBS as OBS
    from billhook.importance.taylor import Taylor as Taylor

    from billhook.calibration.calibration import Calibration as Calibration
    from billhook.calibration.generated import generated as generated
    from billhook.model.plan import ModelPlan as ModelPlan, apply as apply
    from billhook.pruning.amount import Amount as Amount
    from billhook.pruning.planning import plan as plan
    from billhook.pruning.repair import repair as repair
    from billhook.repairs.polish import PolishConfig as PolishConfig
    from billhook.repairs.repair import RepairConfig as RepairConfig
    from billhook.shrinking.result import Budget as Budget, Search as Search
    from billhook.shrinking.shrink import shrink as shrink
    from billhook.kv_heads.convert import convert_kv_heads as convert_kv_heads

    from billhook.sparsity.enforcement import hold_masks as hold_masks
    from billhook.sparsity.options import PruneOptions as PruneOptions
    from billhook.sparsity.prune import prune as prune
    from billhook.sparsity.criteria import Magnitude as Magnitude, Wanda as Wanda
    from billhook.sparsity.sparsegpt import SparseGPT as SparseGPT

    from billhook.callbacks import DepthPruning as DepthPruning, HeadPruning as HeadPruning, StopWhenWorse as StopWhenWorse
    from billhook.pruning.choice import HeadOptions as HeadOptions
    from billhook.callbacks import KVHeadConversion as KVHeadConversion
    from billhook.callbacks import StructuredPruning as StructuredPruning, WeightPruning as WeightPruning
    from billhook.callbacks import Degradation as Degradation, Export as Export, Report as Report, Shrinking as Shrinking
    from billhook.training.module import TransformerModule as TransformerModule
    from billhook.training.data import TextDataModule as TextDataModule
    from billhook.training.polish import polish as polish

else:
    import importlib.util

    # the names above are imported on first use, because importing all of them takes seconds
    _NAMESPACES = ("criteria", "importance", "kv_methods", "pruning", "training")
    _MODULES = {
        "billhook.checkpoints.save": "load save",
        "billhook.model.streamed": "stream",
        "billhook.report.summary": "summary",
        "billhook.report.verdict": "Limits verdict",
        "billhook.training.evaluation": "evaluate",
        "billhook.tracing.trace": "trace",
        "billhook.units.find": "find_units",
        "billhook.units.gates": "gates mask",
        "billhook.importance.score": "score",
        "billhook.importance.activations": "OutputNorm",
        "billhook.importance.obs": "OBS",
        "billhook.importance.taylor": "Taylor",
        "billhook.calibration.calibration": "Calibration",
        "billhook.calibration.generated": "generated",
        "billhook.model.plan": "ModelPlan apply",
        "billhook.pruning.amount": "Amount",
        "billhook.pruning.planning": "plan",
        "billhook.pruning.repair": "repair",
        "billhook.repairs.polish": "PolishConfig",
        "billhook.repairs.repair": "RepairConfig",
        "billhook.shrinking.result": "Budget Search",
        "billhook.shrinking.shrink": "shrink",
        "billhook.kv_heads.convert": "convert_kv_heads",
        "billhook.sparsity.enforcement": "hold_masks",
        "billhook.sparsity.options": "PruneOptions",
        "billhook.sparsity.prune": "prune",
        "billhook.sparsity.criteria": "Magnitude Wanda",
        "billhook.sparsity.sparsegpt": "SparseGPT",
        "billhook.pruning.choice": "HeadOptions",
        "billhook.callbacks": "DepthPruning HeadPruning StopWhenWorse KVHeadConversion StructuredPruning "
        "WeightPruning Degradation Export Report Shrinking",
        "billhook.training.module": "TransformerModule",
        "billhook.training.data": "TextDataModule",
        "billhook.training.polish": "polish",
    }
    _MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
    __all__ = ["schedules", *_NAMESPACES, *_MODULE_OF]

    def __getattr__(name: str) -> object:
        """Imports a public name, or a folder of billhook with all its modules."""
        if name not in __all__ and importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name not in __all__:
            for module in _MODULES:
                importlib.import_module(module)
        if name == "ModelPlan":  # `ModelPlan.from_json` only knows kinds of plans that have been imported
            for module in ("kv_heads.convert", "pruning.planning", "sparsity.prune"):
                importlib.import_module(f"{__name__}.{module}")
        if name not in _MODULE_OF:
            return importlib.import_module(f"{__name__}.{name}")
        globals()[name] = value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        """Lists loaded and importable names."""
        return sorted({*globals(), *__all__})
