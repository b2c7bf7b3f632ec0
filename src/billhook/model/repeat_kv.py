"""Linears that store few heads and hand out many: what an attention's code reads is as ever, what is kept and trained is less."""

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
    """How stored outputs are handed out: pieces of them, each head repeated, dealt in turn to so many blocks of outputs.

    The queries, keys and values of a matrix that holds them one after the other are three pieces in one block; of one that holds
    them head by head, three pieces in one block for each head.

    Attributes:
        blocks: How many blocks of outputs there are; every piece has an equal part in each, in the order of the pieces.
        pieces: For each piece its first stored output, the heads in it, how often each is handed out, and outputs in a head.
    """

    blocks: int
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> int:
        """How many outputs are stored."""
        return max((start + heads * width for start, heads, _, width in self.pieces), default=0)

    @property
    def given(self) -> int:
        """How many outputs are handed out."""
        return sum(heads * repeats * width for _, heads, repeats, width in self.pieces)

    @property
    def heads(self) -> int:
        """How many heads a piece whose heads are repeated has: the KV heads."""
        return min(heads for _, heads, _, _ in self.pieces)

    def repeat(self, stored: Tensor) -> Tensor:
        """Hands out stored outputs as the code that asked for them expects them: `[..., stored]` to `[..., given]`."""
        lead, parts = stored.shape[:-1], []
        for start, heads, repeats, width in self.pieces:
            part = stored.narrow(-1, start, heads * width)
            if repeats > 1:
                part = part.reshape(*lead, heads, 1, width).expand(*lead, heads, repeats, width)
            parts.append(part.reshape(*lead, self.blocks, heads * repeats * width // self.blocks))
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).flatten(-2)

    def index(self) -> Indices:
        """Returns for each output that is handed out the number of the stored one: int64."""
        return cast(Indices, self.repeat(torch.arange(self.stored)).numpy())

    def undo_repeat(self, outputs: Tensor) -> Tensor:
        """Makes stored outputs of what was handed out of them: `[..., given]` to `[..., stored]`."""
        _, first = np.unique(self.index(), return_index=True)
        return outputs[..., torch.from_numpy(first).to(outputs.device)]

    def pooled(self, heads: int) -> Self:
        """Returns how heads are handed out if the repeated ones become fewer."""
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
        """Makes a handing of what `to_list` returned, and refuses anything else."""
        wrong = ValueError(f"heads are handed out as {str(plain)[:80]}, which is not how billhook writes it")
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
    """A linear that stores few heads and hands out many, as `handing` says; its weight and bias keep their names."""

    handing: RepeatLayout

    def forward(self, input: Tensor) -> Tensor:
        """Returns all outputs: `[..., in]` to `[..., handing.given]`."""
        return self.handing.repeat(super().forward(input))


class RepeatedHeadsConv1D(Conv1D):
    """The same of the transposed linear of GPT-2."""

    handing: RepeatLayout

    def forward(self, x: Tensor) -> Tensor:
        """Returns all outputs: `[..., in]` to `[..., handing.given]`."""
        return self.handing.repeat(super().forward(x))  # type: ignore[no-untyped-call]


def repeat_layout_of(module: nn.Module) -> RepeatLayout | None:
    """Returns how a module hands out heads; None if it gives what it stores."""
    return module.handing if isinstance(module, RepeatedHeadsLinear | RepeatedHeadsConv1D) else None


def set_repeat_layout(module: nn.Module, handing: RepeatLayout | None) -> None:
    """Makes a linear hand out heads, in place, or with None the plain linear that it was; its tensors are not touched."""
    attributes: dict[str, Any] = vars(module)
    if handing is None:
        module.__class__ = attributes.pop("_billhook_was")
        del attributes["handing"]
        return
    if repeat_layout_of(module) is None:
        attributes["_billhook_was"] = type(module)
        # a class, as of torch's parametrize: deep and pickled copies have it, and undoing an event takes it back, unlike a hook
        module.__class__ = RepeatedHeadsConv1D if isinstance(module, Conv1D) else RepeatedHeadsLinear
    attributes["handing"] = handing


def find_repeat_layout(keys: Sequence[tuple[int, int, int]], repeated: Sequence[bool], heads: int) -> RepeatLayout | None:
    """Finds how outputs are handed out if heads of some kinds become so many; None if they do not lie regularly.

    For each output it is given its kind (such as query, key, value), head and rank in the head, and if that kind is `repeated`.
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
    handing = RepeatLayout(blocks, tuple(pieces))
    handed_out = np.asarray(stored)[handing.index()]
    return handing if np.array_equal(handed_out.T, [kinds, head // times, rank]) else None
