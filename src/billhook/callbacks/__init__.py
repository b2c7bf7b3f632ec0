"""When things happen: Lightning callbacks, one a file, no maths."""

from billhook.callbacks.export import Export
from billhook.callbacks.head_pruning import HeadPruning
from billhook.callbacks.kv_heads import KVHeadConversion
from billhook.callbacks.report import Report
from billhook.callbacks.weight_pruning import WeightPruning

__all__ = ["Export", "HeadPruning", "KVHeadConversion", "Report", "WeightPruning"]
