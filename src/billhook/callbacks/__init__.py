"""When things happen: Lightning callbacks, one a file, no maths."""

from billhook.callbacks.damage import Damage
from billhook.callbacks.depth_pruning import DepthPruning
from billhook.callbacks.export import Export
from billhook.callbacks.head_pruning import HeadPruning
from billhook.callbacks.kv_heads import KVHeadConversion
from billhook.callbacks.report import Report
from billhook.callbacks.shrink import Shrink
from billhook.callbacks.structured_pruning import StructuredPruning
from billhook.callbacks.uptraining import Uptraining
from billhook.callbacks.weight_pruning import WeightPruning
from billhook.fit.calibration import FitCalibration

__all__ = [
    "FitCalibration",
    "Damage",
    "DepthPruning",
    "Export",
    "HeadPruning",
    "KVHeadConversion",
    "Report",
    "Shrink",
    "StructuredPruning",
    "Uptraining",
    "WeightPruning",
]
