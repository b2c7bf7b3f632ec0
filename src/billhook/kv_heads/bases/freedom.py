"""How the numbers of a head may be mixed without changing the model: found by trying it on the model's own code.

Keys may be multiplied by A and queries by its inverse transpose, q^T A^-1 A k = q^T k, or values by A and output columns by A^-1,
unless a rotary embedding, a norm or a gate stands in between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.kv_heads.bases.alone import Alone, Change, plainly, see_calls
from billhook.kv_heads.bases.stacks import Projections, Stacks

TOLERANCE = 1e-6
"""How far apart, relative to its norm, what an attention gives may be and still be the same: some compute in float32."""


@dataclass(frozen=True)
class Block:
    """Numbers of a head that may be mixed with each other, and with nothing else.

    Attributes:
        real: Their positions in the head.
        imaginary: Where two numbers may only be turned and scaled together, as a complex number: the position of the second;
            `real` is then that of the first.
    """

    real: tuple[int, ...]
    imaginary: tuple[int, ...] = ()

    def put(self, matrices: Tensor, own: Tensor) -> None:
        """Writes a block's matrices into `[heads, width, width]`; a complex number a + ib as [[a, -b], [b, a]]."""
        r, i = torch.tensor(self.real), torch.tensor(self.imaginary, dtype=torch.int64)
        if not len(i):
            matrices[:, r[:, None], r] = own
            return
        matrices[:, r[:, None], r], matrices[:, i[:, None], i] = own.real, own.real
        matrices[:, r[:, None], i], matrices[:, i[:, None], r] = -own.imag, own.imag


Freedom = tuple[Block, ...]
"""The blocks of a head; empty where nothing may be mixed."""


@dataclass(frozen=True)
class Freedoms:
    """How the numbers of keys, and of values, of one attention may be mixed, and whether KV heads may change places."""

    keys: Freedom
    values: Freedom
    order: bool


SHARES = (*(n / 8 for n in range(1, 9)), *(n / 10 for n in range(1, 10)))
"""The shares of a head that rotary embeddings turn, as far as is known."""


def candidates(width: int) -> Iterator[Freedom]:
    """Yields all together; pairs half a rotary width apart, or side by side, and the rest together; freer ones first."""
    yield (Block(tuple(range(width))),)
    widths = sorted({int(width * share) for share in SHARES if width * share % 2 == 0})
    for rotary in reversed(widths):
        half = rotary // 2
        yield (*(Block((f,), (f + half,)) for f in range(half)), *_rest(rotary, width))
    for rotary in widths:
        yield (*(Block((2 * f,), (2 * f + 1,)) for f in range(rotary // 2)), *_rest(rotary, width))


def _rest(start: int, width: int) -> Freedom:
    return (Block(tuple(range(start, width))),) if start < width else ()


def find_freedoms(model: nn.Module, places: Mapping[str, Projections]) -> dict[str, Freedoms]:
    """Finds how the heads of each attention may be mixed, by the attention's name; the model stays as it is.

    It runs the model once, and each attention of a usual kind some four times.
    """
    with undisturbed(model), plainly(model):
        calls = see_calls(model, places)
        found = {}
        for name, place in places.items():
            store_of(model).load(model.get_submodule(name))
            found[name] = _freedoms(Alone(model, place, calls[name]))
        return found


def _freedoms(attention: Alone) -> Freedoms:
    generator, place = torch.Generator().manual_seed(0), attention.place
    with attention.wide():
        attention.draw(generator)
        first = attention()

        def same(there: Change, back: Change) -> bool:
            attention.change(there)
            given = attention()
            attention.change(back)
            return bool((given - first).double().norm() <= TOLERANCE * first.double().norm())

        def passes(change: Callable[[Tensor, int], Change], matrix: Tensor) -> bool:
            there = matrix.to(attention.device)
            return same(change(there, place.queries), change(torch.linalg.inv(there), place.queries))

        (count, width), (_, own) = place.k.index.shape, place.v.index.shape
        options, values = candidates(width) if passes(_keys, _scales(count, width)) else (), (Block(tuple(range(own))),)
        keys = next((free for free in options if passes(_keys, _mixed(count, width, free, generator))), ())
        mixed = passes(_values, _mixed(count, own, values, generator))
        order, back = [*range(1, count), 0], [count - 1, *range(count - 1)]
        return Freedoms(keys, values if mixed else (), same(_moved(order, place.queries), _moved(back, place.queries)))


def in_order(stacks: Stacks, order: Sequence[int]) -> Stacks:
    """Returns the KV heads in another order, or some of them, with their query heads."""
    moved = _moved(order, len(stacks.q) // len(stacks.k))
    return Stacks(**{kind: move(vars(stacks)[kind]) for kind, move in moved.items()})


def _moved(order: Sequence[int], queries: int) -> Change:
    """Puts KV heads in another order, or some of them, with their query heads."""
    heads = [head * queries + query for head in order for query in range(queries)]
    return {kind: itemgetter(own) for kind, own in (("q", heads), ("k", list(order)), ("v", list(order)), ("o", heads))}


def _mixed(count: int, width: int, freedom: Freedom, generator: torch.Generator) -> Tensor:
    """Draws for each head a matrix that mixes its blocks' numbers, `[heads, width, width]`: not orthogonal, well conditioned."""
    matrix = torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
    for head in torch.split(matrix, 1):
        for block in freedom:
            block.put(head, _matrix(block, generator))
    return matrix


def _matrix(block: Block, generator: torch.Generator) -> Tensor:
    if block.imaginary:
        angle, size = torch.rand(2, generator=generator, dtype=torch.float64) + 0.3
        return torch.complex(size * torch.cos(3 * angle), size * torch.sin(3 * angle))
    count = len(block.real)
    square: Tensor = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q
    return square * (0.5 + torch.rand(count, generator=generator, dtype=torch.float64))


def _scales(count: int, width: int) -> Tensor:
    """Returns another factor for each head: what no norm over all heads lets pass."""
    return torch.linspace(0.5, 2, count, dtype=torch.float64)[:, None, None] * torch.eye(width, dtype=torch.float64)


def _keys(matrix: Tensor, queries: int) -> Change:
    """Keys times a matrix, queries times the transpose of its inverse."""
    inverse = torch.linalg.inv(matrix).transpose(1, 2).repeat_interleave(queries, 0)
    return {"k": lambda k: matrix @ k, "q": lambda q: inverse @ q}


def _values(matrix: Tensor, queries: int) -> Change:
    """Values times a matrix, output columns times its inverse."""
    inverse = torch.linalg.inv(matrix).repeat_interleave(queries, 0)
    return {"v": lambda v: matrix @ v, "o": lambda o: o @ inverse}
