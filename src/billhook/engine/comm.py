"""Communication between the ranks of a model: sums, decisions, and work division."""

import math
import pickle
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from billhook.linalg import widest_float

T = TypeVar("T")
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks in place and returns it
PACKED = 2**26  # largest number of bytes in a packed collective; larger tensors are summed in place, as packing copies
MESSAGE = 1024  # bytes of plain data in the first collective; longer data uses a second one
DRAWS = 2**16  # range of random numbers from which ranks without a process group draw their order


class Comm:
    """The ranks that work on a model. Every rank makes the same calls in the same order.

    Args:
        add: Sums a tensor over all ranks in place and returns it. None for a single process.
        rank: The rank of this process.
        size: The number of ranks.
        shared: Whether ranks share each batch, as in training. Otherwise each batch belongs to one rank.
        device: Device on which `add` accepts plain data, and to which tensors on the CPU are moved.
    """

    def __init__(
        self, add: Reduce | None = None, rank: int = 0, size: int = 1, shared: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self._add, self.rank, self.size, self.shared, self.device = add, rank, size, shared, torch.device(device)

    @classmethod
    def of(cls, reduce: "Reduce | Comm | None", model: nn.Module | None = None) -> "Comm":
        """Returns the ranks behind an argument `reduce`.

        The rank is taken from torch's process group, among the ranks that the function sums over. Without a process group,
        ranks draw random numbers until all differ.

        Args:
            reduce: None, a function that sums, or the `Comm` of a training run.
            model: The model, on whose device the function accepts plain data. Defaults to the CPU.

        Raises:
            ValueError: If the function does not return its sum, or does not sum.

        >>> Comm.of(None) is SINGLE_PROCESS, Comm.of(lambda tensor: tensor).size
        (True, 1)
        >>> Comm.of(lambda tensor: None)
        Traceback (most recent call last):
        ValueError: reduce must return the summed tensor, but returned None.
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
                raise ValueError(f"reduce must return the summed tensor, but returned {total!r}.")
            counts = total.tolist()
            if counts[number] < 1:
                raise ValueError(f"reduce must sum over ranks, but turned 1 on this rank into {counts[number]}.")
            if max(counts) == 1:
                return cls(reduce, sum(counts[:number]), sum(counts), device=device)
            number = secrets.randbelow(DRAWS)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks in place and returns it, like a `reduce` function."""
        self.sum_(tensor)
        return tensor

    def sum_(self, *tensors: Tensor) -> None:
        """Sums tensors over all ranks in place, and packs small tensors together."""
        if self._add is None:
            return
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for same_kind in by_kind.values():
            packs, free = list[list[Tensor]](), 0
            for tensor in same_kind:
                size = tensor.numel() * tensor.element_size()
                if not packs or size > free:
                    packs.append([])
                    free = PACKED
                packs[-1].append(tensor)
                free -= size
            for pack in packs:
                # collectives may require contiguous memory, and NCCL takes no CPU tensors
                packed = pack[0].contiguous() if len(pack) == 1 else torch.cat([tensor.reshape(-1) for tensor in pack])
                if packed.device.type == "cpu" and self.device.type != "cpu":
                    packed = packed.to(self.device, widest_float(self.device) if packed.dtype == torch.float64 else packed.dtype)
                total = self._add(packed).reshape(-1)
                for tensor, part in zip(pack, torch.split(total, [tensor.numel() for tensor in pack]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in rank order. For small plain data."""
        return self._exchanged([value], self.rank, self.size)

    def decide(self, make: Callable[[], T]) -> T:
        """Computes a value on the first rank and sends it to all: plain data, or CPU tensors.

        Decisions from floating-point values must be made once, because other hardware may round differently.
        """
        return self._exchanged([make()] if self.rank == 0 else [], 0, 1)[0]

    def _exchanged(self, values: list[T], row: int, rows: int) -> list[T]:
        """Returns a table of values, where each rank fills at most a single row."""
        if self._add is None:
            return values
        data = b"".join(map(pickle.dumps, values))
        # ranks must send equally many bytes: the first message contains the length, long data needs a second
        message = len(data).to_bytes(8, "big") + data if data else b""
        first_parts = self._bytes(message[:MESSAGE], row, rows, MESSAGE)
        ends = [8 + int.from_bytes(first[:8], "big") for first in first_parts]
        second_parts = self._bytes(message[MESSAGE:], row, rows, max(ends) - MESSAGE) if max(ends) > MESSAGE else [b""] * rows
        return [pickle.loads((first + second)[8:end]) for first, second, end in zip(first_parts, second_parts, ends, strict=True)]

    def _bytes(self, data: bytes, row: int, rows: int, width: int) -> list[bytes]:
        """Returns a table of bytes, where each rank fills at most a single row."""
        table = torch.zeros(rows, width, dtype=torch.uint8)
        table[row] = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8)
        return [line.tobytes() for line in self(table.to(self.device)).cpu().numpy()]

    def owned_pieces(self, costs: Sequence[float]) -> list[bool]:
        """Divides work evenly over ranks, and returns whether each piece is this rank's.

        The most expensive piece goes first, each to the rank with the least work so far.

        Args:
            costs: Cost of each piece, identical on all ranks.

        >>> Comm(rank=0, size=2).owned_pieces([1, 5, 2, 2]), Comm(rank=1, size=2).owned_pieces([1, 5, 2, 2])
        ([False, True, False, False], [True, False, True, True])
        """
        loads, owner = [0.0] * self.size, {}
        for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
            owner[piece] = loads.index(min(loads))
            loads[owner[piece]] += costs[piece]
        return [owner[piece] == self.rank for piece in range(len(costs))]

    def owned_rows(self, count: int, most: int) -> list[slice]:
        """Returns this rank's rows of a matrix, in slices.

        Args:
            count: Number of rows.
            most: Largest number of rows in a slice.

        >>> Comm(rank=1, size=2).owned_rows(5, 2), Comm().owned_rows(5, 4)
        ([slice(2, 4, None)], [slice(0, 3, None), slice(3, 5, None)])
        """
        length = math.ceil(count / (self.size * math.ceil(count / (most * self.size))))
        return [slice(first, min(first + length, count)) for first in range(0, count, length)][self.rank :: self.size]

    def batch_numbers(self, counts: Sequence[int]) -> tuple[int, list[int]]:
        """Returns the number of batches over all ranks, and this rank's batch numbers.

        Batches were distributed in turn: the first of every rank, then the second, and so on. If ranks share batches, their
        first batches are parts of one batch, unless no rank has more than one.

        Args:
            counts: Number of batches of each rank.

        >>> Comm(rank=1, size=2).batch_numbers([2, 1]), Comm(rank=1, size=2, shared=True).batch_numbers([2, 1])
        ((3, [1]), (2, [0]))
        """
        if self.shared and max(counts) > 1:
            return max(counts), list(range(counts[self.rank]))
        order = sorted((turn, rank) for rank, count in enumerate(counts) for turn in range(count))
        return len(order), [at for at, (_, rank) in enumerate(order) if rank == self.rank]


SINGLE_PROCESS = Comm()  # a single process, where sums leave tensors unchanged
