"""How the numbers of a head may be mixed without changing the model: found by trying it on the model's own code.

Keys may be multiplied by A and queries by its inverse transpose, q^T A^-1 A k = q^T k, or values by A and output columns by A^-1,
unless a rotary embedding, a norm or a gate stands in between. One attention is run by itself for that, on random numbers and in
float64, as the model calls it (masks, positions, rotary angles), one kind of heads at a time, as an attention in float64 may be
as large as its block. What is the same then differs by 1e-15 (1e-7 where the code computes scores in float32), so that also slow
rotary turns show.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from billhook.engine.state import overridden, undisturbed
from billhook.engine.store import store_of
from billhook.engine.walk import spare
from billhook.kv_heads.layout import HeadRows, Projections, Stacks, put_heads, read_heads
from billhook.linalg import float64_device
from billhook.model.config_fields import configs_of, text_config
from billhook.model.inputs import make_inputs
from billhook.model.linears import matrix_of
from billhook.model.transformers_internals import ATTENTION, attention_of

LENGTH = 128
"""How many tokens are shown: enough for slow turns to be seen."""

FEW = 7
"""How many, where a model does not say how many it can take."""


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call of a module, and those that are named."""
Change = Mapping[str, Callable[[Tensor], Tensor]]
"""What becomes of stacks of heads, by their kind, q, k, v or o, as in `Stacks`."""


class Alone:
    """One attention of a model, and what the model calls it with."""

    def __init__(self, model: nn.Module, place: Projections, call: Call) -> None:
        self._model, self.place, (self._args, self._kwargs) = model, place, call
        self._module = model.get_submodule(place.name)

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Puts all its numbers in float64 for a while, in which it can be called: on the CPU, where its device has none.

        Other tensors replace its own: a parameter whose dtype changes would lose the hooks that DDP has on its gradient.
        """
        linears = (self._model.get_submodule(name) for name in self.place.linears)
        modules = dict.fromkeys([*self._module.modules(), *linears])
        owners: list[dict[str, Any]] = [own for module in modules for own in (module._parameters, module._buffers)]
        held = [(own, name, one) for own in owners for name, one in own.items() if one is not None]
        others = {id(one): _wide(one) for _, _, one in held}  # tied ones stay tied
        try:
            for own, name, one in held:
                own[name] = others[id(one)]
            yield
        finally:
            for own, name, one in held:
                own[name] = one

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._matrix(self.place.k)[0].device

    def draw(self, generator: torch.Generator) -> None:
        """Draws its weights, with which scores are of the size of one where inputs are."""
        for rows in self.place.kinds.values():
            weight, bias = self._matrix(rows)
            heads, width = rows.index.shape
            size = (heads, len(weight), width) if rows.are_read else (heads, width, weight.shape[1] + (bias is not None))
            drawn = torch.randn(size, generator=generator, dtype=weight.dtype).to(weight.device)
            put_heads((weight, bias), rows, drawn / math.sqrt(heads * width if rows.are_read else size[2]))

    def change(self, change: Change) -> None:
        """Changes its weights."""
        for kind, become in change.items():
            rows = self.place.kinds[kind]
            put_heads(self._matrix(rows), rows, become(read_heads(self._model, rows)))

    def _matrix(self, rows: HeadRows) -> tuple[Tensor, Tensor | None]:
        return matrix_of(self._model.get_submodule(rows.linear))

    def __call__(self) -> Tensor:
        """Returns what the linear behind its heads gives, `[calls * tokens, hidden]`."""
        found: list[Tensor] = []
        place = self.place
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(_WideNumbers())
            for number, linear in enumerate(dict.fromkeys((place.q.linear, place.k.linear, place.v.linear))):
                hook = partial(_given_noise, number)
                stack.callback(self._model.get_submodule(linear).register_forward_pre_hook(hook).remove)
            reader = self._model.get_submodule(place.o.linear)
            stack.callback(reader.register_forward_hook(lambda _, args, output: found.append(output.flatten(0, -2))).remove)
            self._module(*_widened(self._args), **_widened(self._kwargs))
        return torch.cat(found)


class _WideNumbers(TorchFunctionMode):
    """Makes tensors of numbers in float64: the least one of that dtype, which masks are made of, is too large for others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        number = func in (torch.tensor, torch.full) and args and isinstance(args[-1], float)
        return func(*args, **({"dtype": torch.float64} if number else {}) | (kwargs or {}))


def see_calls(model: nn.Module, places: Mapping[str, Projections]) -> dict[str, Call]:
    """Runs a model on random tokens and returns with what it calls each of its attentions the first time."""
    calls: dict[str, Call] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, (tuple(map(spare, args)), {key: spare(value) for key, value in kwargs.items()}))

    device, inputs = next(model.parameters()).device, make_inputs(model, length=_length(model))
    with ExitStack() as stack, torch.no_grad():
        for name in places:
            hook = partial(note, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(**{name: one.to(device) if isinstance(one, Tensor) else one for name, one in inputs.items()})
    for name in places:
        if name not in calls:
            raise ValueError(f"{name} is not called as a module, so what its heads do cannot be seen")
    return calls


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Switches to torch's own attention for a while, where the model's kernels know no float64."""
    with ExitStack() as stack:
        for config in configs_of(model):
            if attention_of(config) not in (None, "eager", "sdpa"):
                stack.enter_context(overridden(config, **{ATTENTION: "sdpa"}))
        yield


def _length(model: nn.Module) -> int:
    """Returns half of the length that the model is made for, as some lose places at the start; few, if that is unknown."""
    config: Any = model.config
    said = [getattr(text_config(config), name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min([LENGTH, *(max(number // 2, 1) for number in said if type(number) is int)]) if any(said) else FEW


def _given_noise(number: int, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return noise.to(args[0].device), *args[1:]


def _wide(tensor: Tensor) -> Tensor:
    wide = _doubled(tensor.detach())
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _doubled(tensor: Tensor) -> Tensor:
    tensor = tensor.to(float64_device(tensor.device))
    return tensor.double() if tensor.is_floating_point() else tensor


def _widened(value: Any) -> Any:  # noqa: ANN401
    """Returns the same in float64: a tensor, or one within tuples, lists and dicts; of a cache a copy, to be written to."""
    if isinstance(value, Tensor):
        return _doubled(value)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return {name: _widened(one) for name, one in value.items()} if type(value) is dict else spare(value)


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
