"""Gives modules other parameters for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from billhook.running.casts import fresh_casts
from billhook.running.interrupts import uninterrupted


@contextmanager
def replaced(new: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Puts other values instead of modules' own parameters, given by module and by their name in it; the old ones come back."""
    pairs = [(module.get_parameter(name), value) for module, own in new.items() for name, value in own.items()]
    old = [parameter.data for parameter, _ in pairs]
    with fresh_casts():
        try:
            for parameter, value in pairs:
                parameter.data = value
            yield
        finally:
            with uninterrupted():
                for (parameter, _), value in zip(pairs, old, strict=True):
                    parameter.data = value
