"""The random numbers of training steps (dropout): checkpoints hold them, so that a resumed run draws as the straight run does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Noise:
    """A stream of random numbers of its own: what is drawn elsewhere does not move it, nor the other way round."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}

    @contextmanager
    def drawn(self, device: torch.device) -> Iterator[None]:
        """Within, torch draws from the stream, on the CPU and this device; first from where torch's own is."""
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            if "cpu" in self._states:
                torch.set_rng_state(self._states["cpu"])
            if cuda and "cuda" in self._states:
                torch.cuda.set_rng_state(self._states["cuda"], device)
            try:
                yield
            finally:
                self._states["cpu"] = torch.get_rng_state()
                if cuda:
                    self._states["cuda"] = torch.cuda.get_rng_state(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream is."""
        return dict(self._states)

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        self._states = {kind: state.cpu() for kind, state in states.items()}
