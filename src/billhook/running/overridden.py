"""Gives an object other attributes for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

OPEN = "_overridden"
"""The name under which an object holds the blocks that are open, in the order in which they were entered."""


@dataclass(eq=False)
class _Block:
    """The attributes that a block gives, and those that were there before."""

    given: dict[str, Any]
    before: dict[str, Any]


@contextmanager
def overridden(owner: object, **attributes: object) -> Iterator[None]:
    """Gives an object other attributes within the block; afterwards it has its own again, or its class's if it had none.

    Modules do not register what is given. Blocks may be nested, and may also end in another order than they began, as those of
    runs that rest in turn (`Walk`) do.

    >>> from torch import nn
    >>> model = nn.Identity()
    >>> with overridden(model, forward=lambda x: 2 * x):
    ...     model(3)
    6
    >>> model(3)
    3
    """
    own = vars(owner)
    blocks: list[_Block] = own.setdefault(OPEN, [])
    mine = _Block(attributes, {name: own[name] for name in attributes if name in own})
    blocks.append(mine)
    own.update(attributes)
    try:
        yield
    finally:
        later = blocks[blocks.index(mine) + 1 :]
        for name in attributes:
            inner = next((block.before for block in later if name in block.given), own)
            inner.pop(name, None)
            inner.update({name: mine.before[name]} if name in mine.before else {})
        blocks.remove(mine)
        if not blocks:
            del own[OPEN]
