"""How the numbers of a head may be mixed without changing the model: found by trying it on the model's own code.

Keys may be multiplied by A and queries by its inverse transpose, q^T A^-1 A k = q^T k, or values by A and output columns by A^-1,
unless a rotary embedding, a norm or a gate stands in between.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from billhook.kv_heads.bases.alone import Alone, plainly, see_calls
from billhook.kv_heads.bases.stacks import Projections, Stacks
from billhook.running.undisturbed import undisturbed
from billhook.streaming.either import bring

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
            bring(model, model.get_submodule(name))
            found[name] = _freedoms(Alone(model, place, calls[name]))
        return found


def _freedoms(attention: Alone) -> Freedoms:
    generator = torch.Generator().manual_seed(0)
    with attention.wide():
        drawn = _drawn(attention.stacks(), generator)
        first = attention(drawn)

        def same(tried: Stacks) -> bool:
            return bool((attention(tried) - first).double().norm() <= TOLERANCE * first.double().norm())

        options = candidates(drawn.k.shape[1]) if same(_keys(drawn, _scales(drawn.k))) else ()
        keys = next((free for free in options if same(_keys(drawn, _mixed(drawn.k, free, generator)))), ())
        values = (Block(tuple(range(drawn.v.shape[1]))),)
        mixed = same(_values(drawn, _mixed(drawn.v, values, generator)))
        return Freedoms(keys, values if mixed else (), same(in_order(drawn, [*range(1, len(drawn.k)), 0])))


def in_order(stacks: Stacks, order: Sequence[int]) -> Stacks:
    """Returns the KV heads in another order, or some of them, with their query heads."""
    queries = len(stacks.q) // len(stacks.k)
    heads = [head * queries + query for head in order for query in range(queries)]
    return Stacks(stacks.q[heads], stacks.k[list(order)], stacks.v[list(order)], stacks.o[heads])


def _drawn(stacks: Stacks, generator: torch.Generator) -> Stacks:
    """Draws projections of the same sizes, with which scores are of the size of one where inputs are."""

    def draw(stack: Tensor, width: int) -> Tensor:
        return torch.randn(stack.shape, generator=generator, dtype=stack.dtype).to(stack.device) / math.sqrt(width)

    q, k, v = (draw(stack, stack.shape[2]) for stack in (stacks.q, stacks.k, stacks.v))
    return Stacks(q, k, v, draw(stacks.o, len(stacks.o) * stacks.o.shape[2]))


def _mixed(stack: Tensor, freedom: Freedom, generator: torch.Generator) -> Tensor:
    """Draws for each head a matrix that mixes its blocks' numbers, `[heads, width, width]`: not orthogonal, well conditioned."""
    count, width = stack.shape[:2]
    matrix = torch.eye(width, dtype=stack.dtype).repeat(count, 1, 1)
    for head in torch.split(matrix, 1):
        for block in freedom:
            block.put(head, _matrix(block, stack.dtype, generator))
    return matrix.to(stack.device)


def _matrix(block: Block, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if block.imaginary:
        angle, size = torch.rand(2, generator=generator, dtype=dtype) + 0.3
        return torch.complex(size * torch.cos(3 * angle), size * torch.sin(3 * angle))
    count = len(block.real)
    square: Tensor = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=dtype)).Q
    return square * (0.5 + torch.rand(count, generator=generator, dtype=dtype))


def _scales(stack: Tensor) -> Tensor:
    """Returns another factor for each head: what no norm over all heads lets pass."""
    sizes = torch.linspace(0.5, 2, len(stack), dtype=stack.dtype, device=stack.device)
    return sizes[:, None, None] * torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)


def _keys(stacks: Stacks, matrix: Tensor) -> Stacks:
    """Keys times a matrix, queries times the transpose of its inverse."""
    inverse = torch.linalg.inv(matrix).transpose(1, 2).repeat_interleave(len(stacks.q) // len(stacks.k), 0)
    return replace(stacks, k=matrix @ stacks.k, q=inverse @ stacks.q)


def _values(stacks: Stacks, matrix: Tensor) -> Stacks:
    """Values times a matrix, output columns times its inverse."""
    inverse = torch.linalg.inv(matrix).repeat_interleave(len(stacks.q) // len(stacks.k), 0)
    return replace(stacks, v=matrix @ stacks.v, o=stacks.o @ inverse)
