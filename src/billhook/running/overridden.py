"""Gives an object other attributes for a while."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def overridden(owner: object, **attributes: object) -> Iterator[None]:
    """Gives an object other attributes within the block; afterwards it has its own again, or its class's if it had none.

    Modules do not register what is given, and blocks may be nested.

    >>> from torch import nn
    >>> model = nn.Identity()
    >>> with overridden(model, forward=lambda x: 2 * x):
    ...     model(3)
    6
    >>> model(3)
    3
    """
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
