"""A model at rest: evaluated without a trace of it afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Evaluation without dropout, key-value cache or compiled code; modes, random numbers, configs are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {id(m.config): m.config for m in modes if getattr(getattr(m, "config", None), "use_cache", False)}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        for config in configs.values():
            config.use_cache = False
        model.eval()
        with torch.random.fork_rng(devices, device_type=kind), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in configs.values():
            config.use_cache = True
