"""The ranks that work on one model, each on data of its own: sums, decisions that all take from one, and divided work."""

import math
import pickle
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place, and returns it."""
PACKED = 2**26
"""Bytes that are packed into one collective, at most; a larger tensor is summed where it lies, as packing takes a copy."""
MESSAGE = 1024
"""Bytes of plain data that go in the first collective; longer data takes a second one."""
DRAWS = 2**16
"""Among how many numbers ranks draw who know only how to sum."""


class Comm:
    """The ranks that work on one model; by default one. Every rank makes the same calls in the same order.

    Args:
        add: Sums a tensor over all ranks, in place, and returns it; None where there is one.
        rank: The number of this one, from 0 on.
        size: How many there are.
        shared: Whether ranks share each batch, as in training; otherwise every batch is one rank's.
        device: Where `add` takes plain data.
    """

    def __init__(
        self,
        add: Reduce | None = None,
        rank: int = 0,
        size: int = 1,
        shared: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._add, self.rank, self.size, self.shared, self.device = add, rank, size, shared, torch.device(device)

    @classmethod
    def of(cls, reduce: "Reduce | Comm | None", model: nn.Module | None = None) -> "Comm":
        """Returns the ranks behind an argument `reduce`.

        A function does not say which rank this is. It is that of torch's process group, among those over which the function
        sums; without a process group ranks draw numbers, until no two have the same.

        Args:
            reduce: None, a function that sums, or the ranks of a fit.
            model: The model, on whose device the function takes plain data; by default the CPU.

        Raises:
            ValueError: If the function does not return what it has summed, or does not sum.

        >>> Comm.of(None) is ALONE, Comm.of(lambda tensor: tensor).size
        (True, 1)
        >>> Comm.of(lambda tensor: None)
        Traceback (most recent call last):
        ValueError: reduce: it must return the tensor that it has summed, and returned None
        """
        if isinstance(reduce, Comm):
            return reduce
        if reduce is None:
            return SINGLE_PROCESS
        first = None if model is None else next(model.parameters(), None)
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        number = dist.get_rank() if dist.is_available() and dist.is_initialized() else secrets.randbelow(DRAWS)
        while True:
            table = torch.zeros(DRAWS, dtype=torch.int32, device=device)
            table[number] = 1
            total = reduce(table)
            if not isinstance(total, Tensor):
                raise ValueError(f"reduce: it must return the tensor that it has summed, and returned {total!r}")
            counts = total.tolist()
            if counts[number] < 1:
                raise ValueError(f"reduce: it must sum over ranks, and made {counts[number]} of this rank's 1")
            if max(counts) == 1:
                return cls(reduce, sum(counts[:number]), sum(counts), device=device)
            number = secrets.randbelow(DRAWS)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place, and returns it, as a function for `reduce` does."""
        self.sum_(tensor)
        return tensor

    def sum_(self, *tensors: Tensor) -> None:
        """Sums tensors over all ranks, in place; those of one dtype and device go in one collective, unless they are large."""
        if self._add is None:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            for pack in _packs(alike):
                if len(pack) == 1:
                    pack[0].copy_(self._add(pack[0].contiguous()))  # a collective may want memory without gaps
                    continue
                total = self._add(torch.cat([tensor.reshape(-1) for tensor in pack]))
                for tensor, part in zip(pack, torch.split(total, [tensor.numel() for tensor in pack]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """Returns what each rank has, by rank: plain data, small."""
        return self._exchanged([value], self.rank, self.size)

    def decide(self, make: Callable[[], T]) -> T:
        """Makes something on the first rank, which all get: plain data, and tensors on the CPU.

        What follows from floating-point numbers is decided once and sent: each by itself, ranks with other hardware might come to
        other decisions, and go different ways.
        """
        return self._exchanged([make()] if self.rank == 0 else [], 0, 1)[0]

    def _exchanged(self, values: list[T], row: int, rows: int) -> list[T]:
        """Returns the rows of a table of values, into one row of which each rank puts one value, or none."""
        if self._add is None:
            return values
        data = b"".join(map(pickle.dumps, values))
        # all ranks send as many bytes, so the first message says how long each is; only if one is longer there is a second
        message = len(data).to_bytes(8, "big") + data if data else b""
        heads = self._bytes(message[:MESSAGE], row, rows, MESSAGE)
        ends = [8 + int.from_bytes(head[:8], "big") for head in heads]
        rests = self._bytes(message[MESSAGE:], row, rows, max(ends) - MESSAGE) if max(ends) > MESSAGE else [b""] * rows
        return [pickle.loads((head + rest)[8:end]) for head, rest, end in zip(heads, rests, ends, strict=True)]

    def _bytes(self, data: bytes, row: int, rows: int, width: int) -> list[bytes]:
        """Returns the rows of a table of bytes, to one row of which each rank adds, or nothing."""
        table = torch.zeros(rows, width, dtype=torch.uint8)
        table[row] = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8)
        return [line.tobytes() for line in self(table.to(self.device)).cpu().numpy()]

    def owned_pieces(self, costs: Sequence[float]) -> list[bool]:
        """Picks this rank's pieces of work, so that no rank has much more than others.

        The dearest piece goes first, each to the rank with the least so far.

        Args:
            costs: What each piece costs, the same on all ranks.

        >>> Comm(rank=0, size=2).own_of([1, 5, 2, 2]), Comm(rank=1, size=2).own_of([1, 5, 2, 2])
        ([False, True, False, False], [True, False, True, True])
        """
        done, owner = [0.0] * self.size, dict[int, int]()
        for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
            owner[piece] = done.index(min(done))
            done[owner[piece]] += costs[piece]
        return [owner[piece] == self.rank for piece in range(len(costs))]

    def owned_rows(self, count: int, most: int) -> list[slice]:
        """Picks this rank's rows of a matrix, some at a time.

        Args:
            count: How many rows there are.
            most: How many are taken at a time, at most.

        >>> Comm(rank=1, size=2).rows_of(5, 2), Comm().rows_of(5, 4)
        ([slice(2, 4, None)], [slice(0, 3, None), slice(3, 5, None)])
        """
        length = math.ceil(count / (self.size * math.ceil(count / (most * self.size))))
        return [slice(first, min(first + length, count)) for first in range(0, count, length)][self.rank :: self.size]

    def batch_numbers(self, counts: Sequence[int]) -> tuple[int, list[int]]:
        """Counts the batches of all ranks together, and numbers this one's among them, as one process has them.

        They were dealt out in turn: each rank's first one, rank by rank, then their second ones. Where ranks share batches, their
        first ones are parts of one batch, and so on; but where none has more than one, these are batches of their own.

        Args:
            counts: How many each rank has.

        >>> Comm(rank=1, size=2).dealt([2, 1]), Comm(rank=1, size=2, shared=True).dealt([2, 1])
        ((3, [1]), (2, [0]))
        """
        if self.shared and max(counts) > 1:
            return max(counts), list(range(counts[self.rank]))
        order = sorted((turn, rank) for rank, count in enumerate(counts) for turn in range(count))
        return len(order), [at for at, (_, rank) in enumerate(order) if rank == self.rank]


SINGLE_PROCESS = Comm()
"""One process: every sum is what it has."""


def _packs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divides tensors into those that are summed together, in order: as many as fit, and larger ones by themselves."""
    packs, room = list[list[Tensor]](), 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not packs or size > room:
            packs.append([])
            room = PACKED
        packs[-1].append(tensor)
        room -= size
    return packs
