"""Puts units of a model in another order, in every parameter that has them, and takes that back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from billhook.model.shapes.handed import Indices
from billhook.sparsity.orders.free import Free

Ordered = Sequence[tuple[Free, Indices]]
"""Axes, each with the unit of each set that comes to each place: int64, `[sets, units]`."""

Move = tuple[Tensor, int, Tensor]
"""A tensor, one of its dimensions, and the position that comes to each place of it."""


def put_in_order(model: nn.Module, ordered: Ordered) -> None:
    """Puts units in other places, in place: parameters, their gradients and buffers; all of them or, after an interrupt, none.

    No more memory is taken than the largest tensor has, before anything has changed.

    Raises:
        MemoryError: Before anything has changed, if there is no memory for that; or torch's own error.
    """
    interrupt = _move(_moves(model, ordered))
    if interrupt is not None:
        put_back(model, ordered)
        raise interrupt


def put_back(model: nn.Module, ordered: Ordered) -> None:
    """Puts units back in the places that they had before: the same bits. An interrupt is raised when all are."""
    interrupt = _move(_moves(model, [(free, np.argsort(orders, axis=1)) for free, orders in ordered]))
    if interrupt is not None:
        raise interrupt


def _moves(model: nn.Module, ordered: Ordered) -> list[Move]:
    """Finds what is moved: the smallest tensors first."""
    tensors, moves = dict([*model.named_parameters(), *model.named_buffers()]), list[Move]()
    for free, orders in ordered:
        for member in free.group.members:
            positions, taken = free.positions(member.axis), np.arange(member.axis.size)
            taken[positions] = np.take_along_axis(positions, orders[:, :, None], axis=1)
            tensor = tensors[member.name]
            own = [tensor.detach()] if tensor.grad is None else [tensor.detach(), tensor.grad.detach()]
            moves += [(one, member.dim, torch.from_numpy(taken).to(one.device)) for one in own]
    return sorted(moves, key=lambda move: move[0].nbytes)


@torch.no_grad()
def _move(moves: list[Move]) -> KeyboardInterrupt | None:
    """Moves what there is, from the end; returns an interrupt that has come meanwhile."""
    new, interrupt = dict[int, Tensor](), None
    while moves:
        tensor, dim, taken = moves[-1]
        try:
            if len(moves) not in new:
                new = {len(moves): tensor.index_select(dim, taken)}
            tensor.copy_(new[len(moves)])  # the same if it is done twice
            moves.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    return interrupt
