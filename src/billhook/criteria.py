"""Criteria, sparsity allocation, and reconstruction for weight pruning."""

from billhook.engine import InputGram, InputNorms
from billhook.repairs.matching import BlockMatching
from billhook.sparsity.allocation import OWL, Allocation
from billhook.sparsity.alps import ALPS, Refit
from billhook.sparsity.criteria import RIA, Criterion, Magnitude, Wanda
from billhook.sparsity.sparsegpt import SparseGPT

__all__ = [
    "ALPS", "OWL", "RIA", "Allocation", "BlockMatching", "Criterion", "InputGram", "InputNorms", "Magnitude", "Refit",
    "SparseGPT", "Wanda",
]  # fmt: skip
