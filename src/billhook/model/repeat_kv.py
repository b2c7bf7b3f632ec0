"""Linear layers that store few KV heads and return them repeated."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

Indices = NDArray[np.int64]
LARGEST = 2**31
Piece = tuple[int, int, int, int]


@dataclass(frozen=True)
class RepeatLayout:
    """The layout of repeated heads in the stored outputs of a linear layer.

    Queries, keys, and values in sequence in a matrix are three pieces in one block. Stored head by head, they are three pieces in
    one block per head.

    Attributes:
        blocks: Number of blocks of outputs. Each contains an equal part of every piece, in order.
        pieces: First stored output, number of heads, repeats, and head dimension of each piece.
    """

    blocks: int
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> int:
        """The number of stored outputs."""
        return max((start + heads * width for start, heads, _, width in self.pieces), default=0)

    @property
    def returned(self) -> int:
        """The number of returned outputs."""
        return sum(heads * repeats * width for _, heads, repeats, width in self.pieces)

    @property
    def heads(self) -> int:
        """The number of KV heads: heads in a repeated piece."""
        return min(heads for _, heads, _, _ in self.pieces)

    def repeat(self, stored: Tensor) -> Tensor:
        """Repeats stored outputs: `[..., stored]` to `[..., returned]`."""
        lead, parts = stored.shape[:-1], []
        for start, heads, repeats, width in self.pieces:
            part = stored.narrow(-1, start, heads * width)
            if repeats > 1:
                part = part.reshape(*lead, heads, 1, width).expand(*lead, heads, repeats, width)
            parts.append(part.reshape(*lead, self.blocks, heads * repeats * width // self.blocks))
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).flatten(-2)

    def index(self) -> Indices:
        """Returns the stored output of each returned output: int64."""
        return cast(Indices, self.repeat(torch.arange(self.stored)).numpy())

    def undo_repeat(self, outputs: Tensor) -> Tensor:
        """Selects stored outputs from returned outputs: `[..., returned]` to `[..., stored]`."""
        _, first = np.unique(self.index(), return_index=True)
        return outputs[..., torch.from_numpy(first).to(outputs.device)]

    def pooled(self, heads: int) -> Self:
        """Returns the layout after the repeated heads were reduced to a smaller number."""
        pieces, start = list[Piece](), 0
        for _, before, repeats, width in self.pieces:
            after = heads if repeats > 1 else before
            pieces.append((start, after, before * repeats // after, width))
            start += after * width
        return type(self)(self.blocks, tuple(pieces))

    def to_list(self) -> list[Any]:
        """Returns plain lists and numbers."""
        return [self.blocks, [list(piece) for piece in self.pieces]]

    @classmethod
    def from_list(cls, plain: object) -> Self:
        """Creates a layout from the result of `to_list`. Raises for anything else."""
        wrong = ValueError(f"{str(plain)[:80]} is not a valid layout of repeated heads.")
        if not isinstance(plain, list) or len(plain) != 2 or not isinstance(plain[1], list) or not 0 < len(plain[1]) <= 8:
            raise wrong
        blocks, pieces = plain
        start = 0
        for piece in pieces:
            if not isinstance(piece, list) or len(piece) != 4:
                raise wrong
            if any(type(number) is not int or not 0 <= number < LARGEST for number in (blocks, *piece)):
                raise wrong
            first, heads, repeats, width = piece
            if first != start or 0 in (blocks, heads, repeats, width) or heads * repeats * width % blocks:
                raise wrong
            start += heads * width
        return cls(blocks, tuple(cast(Piece, tuple(piece)) for piece in pieces))


class RepeatedHeadsLinear(nn.Linear):
    """A linear layer that stores few heads and repeats them, with the same parameter names."""

    repeat_layout: RepeatLayout

    def forward(self, input: Tensor) -> Tensor:
        """Returns all outputs: `[..., in]` to `[..., returned]`."""
        return self.repeat_layout.repeat(super().forward(input))


class RepeatedHeadsConv1D(Conv1D):
    """A `Conv1D` layer of GPT-2 that stores few heads and repeats them."""

    repeat_layout: RepeatLayout

    def forward(self, x: Tensor) -> Tensor:
        """Returns all outputs: `[..., in]` to `[..., returned]`."""
        return self.repeat_layout.repeat(super().forward(x))  # type: ignore[no-untyped-call]


def repeat_layout_of(module: nn.Module) -> RepeatLayout | None:
    """Returns the layout of repeated heads of a module. None if it repeats nothing."""
    return module.repeat_layout if isinstance(module, RepeatedHeadsLinear | RepeatedHeadsConv1D) else None


def set_repeat_layout(module: nn.Module, layout: RepeatLayout | None) -> None:
    """Makes a linear layer repeat heads in place, or with None a plain layer."""
    attributes: dict[str, Any] = vars(module)
    if layout is None:
        module.__class__ = attributes.pop("_billhook_plain_class")
        del attributes["repeat_layout"]
        return
    if repeat_layout_of(module) is None:
        attributes["_billhook_plain_class"] = type(module)
        # a class, like torch's parametrize: unlike a hook, copies have it, and undoing an event restores it
        module.__class__ = RepeatedHeadsConv1D if isinstance(module, Conv1D) else RepeatedHeadsLinear
    attributes["repeat_layout"] = layout


def find_repeat_layout(keys: Sequence[tuple[int, int, int]], repeated: Sequence[bool], heads: int) -> RepeatLayout | None:
    """Finds the layout if heads of some kinds are reduced to `heads`. None if it is irregular.

    Each output is given by kind (such as query, key, or value), head, and position in the head, and by whether its kind is
    repeated.
    """
    kinds, head, rank = np.asarray(keys, np.int64).T
    pieces, stored, times = list[Piece](), list[tuple[int, int, int]](), np.ones_like(kinds)
    for kind in dict.fromkeys(kinds.tolist()):
        outputs = np.flatnonzero(kinds == kind)
        before = int(head[outputs].max()) + 1
        after = heads if repeated[outputs[0]] else before
        if len(outputs) % before or before % after:
            return None
        times[outputs], width = before // after, len(outputs) // before
        pieces.append((len(stored), after, before // after, width))
        stored += product([kind], range(after), range(width))
    changes = int(np.count_nonzero(np.diff(kinds))) + 1  # a plain number: it is saved as JSON
    blocks = changes // len(pieces)
    if changes % len(pieces) or any(many * repeats * width % blocks for _, many, repeats, width in pieces):
        return None
    layout = RepeatLayout(blocks, tuple(pieces))
    returned = np.asarray(stored)[layout.index()]
    return layout if np.array_equal(returned.T, [kinds, head // times, rank]) else None
