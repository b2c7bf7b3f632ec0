"""LoRA injected without PEFT."""

import peft
import torch

from kit import fits


def injected(seed=0, **options):
    """billhook's module, with LoRA in its model; every linear has 32 inputs."""
    lit = fits.module(seed, intermediate_size=32)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(**{"r": 2, "target_modules": "all-linear"} | options), lit.model)
    return lit
