"""Random numbers: those of training steps (dropout), of their own for each; and those that are torch's, Python's and NumPy's."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


class Noise:
    """Random numbers of each step, from a seed, the step and the process: a resumed run draws as the straight run does."""

    def __init__(self) -> None:
        self.seed: int | None = None

    def draw(self) -> int:
        """Returns the seed; draws it at first from where torch's own random numbers are, which stay there."""
        if self.seed is None:
            with torch.random.fork_rng(devices=[]):
                self.seed = int(torch.randint(2**62, ()))
        return self.seed

    @contextmanager
    def drawn(self, device: torch.device, step: int, rank: int) -> Iterator[None]:
        """Has torch draw from the numbers of a step within the block, on the CPU and this device."""
        own = int.from_bytes(hashlib.blake2b(f"{self.draw()} {step} {rank}".encode(), digest_size=7).digest(), "big")
        with seeded(own, device):
            yield

    def state_dict(self) -> dict[str, int]:
        """Returns the seed, once there is one."""
        return {} if self.seed is None else {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on with that seed."""
        self.seed = state.get("seed")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Has torch draw from the numbers of a seed within the block, on the CPU and this device."""
    with forked(device):
        torch.default_generator.manual_seed(seed)
        if _has_own(device):
            with torch.accelerator.device_index(device.index):
                torch.get_device_module(device).manual_seed(seed)
        yield


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Has torch's random numbers, on the CPU and a device, go on after the block as if nothing had been drawn within."""
    devices, kind = ([device], device.type) if _has_own(device) else ([], "cpu")
    forking: AbstractContextManager[None] = torch.random.fork_rng(devices, device_type=kind)
    return forking


def _has_own(device: torch.device) -> bool:
    """Tells whether a device has random numbers of its own."""
    return device.type not in ("cpu", "meta")


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the random numbers of torch (on the CPU and a device), Python and NumPy, as plain data and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, torch.from_numpy(np.asarray(keys).astype("int64")), *rest)
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    return state | ({device.type: torch.get_device_module(device).get_rng_state(device)} if _has_own(device) else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Goes on from there."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
    if _has_own(device) and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)
