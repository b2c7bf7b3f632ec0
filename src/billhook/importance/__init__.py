"""Importance scores of units, with a file for each paper."""

from billhook.importance.ablation import Ablation, ablate_heads
from billhook.importance.activations import ActivationNorm, OutputNorm
from billhook.importance.baselines import WeightNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.obs import OBS
from billhook.importance.reap import REAP, GateMass, RoutingFrequency
from billhook.importance.score import Importance, Sums
from billhook.importance.taylor import Taylor

__all__ = [
    "OBS", "REAP", "Ablation", "ActivationNorm", "BlockInfluence", "GateGradient", "GateMass", "Importance", "OutputNorm",
    "RoutingFrequency", "Sums", "Taylor", "WeightNorm", "ablate_heads",
]  # fmt: skip
