"""Criteria, sparsity allocation, and reconstruction for weight pruning."""

from billhook.repairs.matching import BlockMatching
from billhook.sparsity.allocation import OWL
from billhook.sparsity.alps import ALPS, Refit
from billhook.sparsity.criteria import RIA, Magnitude, Wanda
from billhook.sparsity.sparsegpt import SparseGPT

__all__ = ["ALPS", "OWL", "RIA", "BlockMatching", "Magnitude", "Refit", "SparseGPT", "Wanda"]
