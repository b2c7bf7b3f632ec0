"""Lightning callbacks, each of which applies a method at given steps of training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billhook.callbacks.degradation import Degradation as Degradation
    from billhook.callbacks.depth_pruning import DepthPruning as DepthPruning
    from billhook.callbacks.export import Export as Export
    from billhook.callbacks.head_pruning import HeadPruning as HeadPruning
    from billhook.callbacks.head_pruning import StopWhenWorse as StopWhenWorse
    from billhook.callbacks.kv_heads import KVHeadConversion as KVHeadConversion
    from billhook.callbacks.report import Report as Report
    from billhook.callbacks.shrinking import Shrinking as Shrinking
    from billhook.callbacks.structured_pruning import StructuredPruning as StructuredPruning
    from billhook.callbacks.weight_pruning import WeightPruning as WeightPruning
    from billhook.fit.calibration import FitCalibration as FitCalibration
    from billhook.fit.event import EventCallback as EventCallback

else:  # imported on first use, because each callback needs other modules
    _MODULES = {
        "EventCallback": "billhook.fit.event",
        "FitCalibration": "billhook.fit.calibration",
        "Degradation": "billhook.callbacks.degradation",
        "DepthPruning": "billhook.callbacks.depth_pruning",
        "Export": "billhook.callbacks.export",
        "HeadPruning": "billhook.callbacks.head_pruning",
        "KVHeadConversion": "billhook.callbacks.kv_heads",
        "Report": "billhook.callbacks.report",
        "StopWhenWorse": "billhook.callbacks.head_pruning",
        "Shrinking": "billhook.callbacks.shrinking",
        "StructuredPruning": "billhook.callbacks.structured_pruning",
        "WeightPruning": "billhook.callbacks.weight_pruning",
    }
    __all__ = [*_MODULES]

    def __getattr__(name: str) -> object:
        """Imports a callback."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
