"""Finds changes of basis of keys and values that leave an attention module's outputs.

Keys may be multiplied by A and queries by its inverse transpose, q^T A^-1 A k = q^T k, or values by A and output columns by
A^-1, unless a rotary embedding, a norm, or a gate is in between. This is tested on the model's own code. One attention module
runs on random numbers in float64 with the arguments that the model passes (masks, positions, rotary angles), one kind of heads
at a time, as an attention module in float64 may be as large as its block. Equal outputs then differ by 1e-15 (1e-7 if the code
computes scores in float32), so that slow rotations show too.
"""

import copy
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
from transformers import Cache

from billhook.engine.state import evaluating_without_grad
from billhook.engine.store import store_of
from billhook.engine.trees import tree_map_only
from billhook.kv_heads.layout import HeadRows, HeadTensors, Projections, put_heads, read_heads
from billhook.linalg import float64_device
from billhook.model.config_fields import text_config
from billhook.model.inputs import small_inputs
from billhook.model.layers import matrix_of
from billhook.model.transformers_internals import attention_for_all_dtypes, attention_functions_as

LENGTH = 128
"""Number of tokens: enough to detect slow rotations."""

FEW = 7
"""Number of tokens if the model does not state its maximum length."""

TOLERANCE = 1e-6
"""Largest relative difference of equal outputs: some code computes in float32."""

SHARES = (*(n / 8 for n in range(1, 9)), *(n / 10 for n in range(1, 10)))
"""Known fractions of a head that rotary embeddings rotate."""


@dataclass(frozen=True)
class Mixing:
    """Dimensions of a head that may be mixed only with each other.

    Attributes:
        real: Their positions in the head.
        imaginary: Positions of second dimensions, if pairs of dimensions may only be mixed as complex numbers; `real` has then
            those of the first.
    """

    real: tuple[int, ...]
    imaginary: tuple[int, ...] = ()

    def put(self, matrices: Tensor, mix: Tensor, columns: "Mixing | None" = None) -> None:
        """Writes matrices that mix these dimensions into `[heads, width, width]`.

        A complex number a + ib as [[a, -b], [b, a]].

        Args:
            matrices: The matrices to change.
            mix: Matrices to write, or a single one.
            columns: Positions of columns; by default those of rows.
        """
        columns = columns or self
        r, i = torch.tensor(self.real)[:, None], torch.tensor(self.imaginary, dtype=torch.int64)[:, None]
        to_r, to_i = torch.tensor(columns.real, dtype=torch.int64), torch.tensor(columns.imaginary, dtype=torch.int64)
        if not self.imaginary:
            matrices[:, r, to_r] = mix
            return
        matrices[:, r, to_r] = matrices[:, i, to_i] = mix.real
        matrices[:, r, to_i] = -mix.imag
        matrices[:, i, to_r] = mix.imag

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draws a matrix that mixes the dimensions, complex for pairs.

        Not orthogonal, well conditioned.
        """
        count = len(self.real)
        drawn = torch.randn(2, count, count, generator=generator, dtype=torch.float64)
        square: Tensor = torch.linalg.qr(torch.complex(*drawn) if self.imaginary else drawn[0]).Q
        return square * (0.5 + torch.rand(count, generator=generator, dtype=torch.float64))


Symmetry = tuple[Mixing, ...]
"""Mixings of a head; empty if no dimensions may be mixed."""


@dataclass(frozen=True)
class Symmetries:
    """Changes that an attention module permits, and whether its attention weights are seen.

    Attributes:
        keys: Dimensions of keys that may be mixed.
        values: Dimensions of values that may be mixed.
        order: Whether KV heads may be reordered.
        interface: Whether its output layer reads what a single call of transformers' attention interface returns.
    """

    keys: Symmetry
    values: Symmetry
    order: bool
    interface: bool = True


def candidates(width: int) -> Iterator[Symmetry]:
    """Yields possible symmetries, the largest first: all dimensions.

    Rotary pairs half a rotary width apart, or adjacent.
    """
    yield (Mixing(tuple(range(width))),)
    rotary_widths = sorted({int(width * share) for share in SHARES if width * share % 2 == 0})
    for rotary in reversed(rotary_widths):
        half = rotary // 2
        yield _paired(range(half), range(half, rotary), width)
    for rotary in rotary_widths:
        yield _paired(range(0, rotary, 2), range(1, rotary, 2), width)


def _paired(real: Sequence[int], imaginary: Sequence[int], width: int) -> Symmetry:
    rest = tuple(range(2 * len(real), width))
    return (
        *(Mixing((first,), (second,)) for first, second in zip(real, imaginary, strict=True)),
        *([Mixing(rest)] if rest else []),
    )


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""
Transform = Mapping[str, Callable[[Tensor], Tensor]]
"""Changes of heads by kind, q, k, v, or o, as in `HeadTensors`."""


class AttentionProbe:
    """One attention module with the arguments that the model passes."""

    def __init__(self, model: nn.Module, projections: Projections, call: Call) -> None:
        self._model, self.projections, self._call = model, projections, call
        self._module = model.get_submodule(projections.name)
        self.interface = False  # after a call, see `Symmetries`

    @contextmanager
    def as_float64(self) -> Iterator[None]:
        """Runs the module in float64 within a `with` block.

        On the CPU if its device has no float64.

        Its tensors are replaced, because a parameter whose dtype changes would lose the gradient hooks of DDP.
        """
        modules = dict.fromkeys([*self._module.modules(), *map(self._model.get_submodule, self.projections.linears)])
        tables: list[dict[str, Any]] = [table for module in modules for table in (module._parameters, module._buffers)]
        before = [(table, dict(table)) for table in tables]
        in_float64: dict[int, Tensor] = {}  # by the id of the tensor, so that tied ones stay tied
        try:
            for table, tensors in before:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        table[name] = in_float64.setdefault(id(tensor), _as_float64(tensor))
            yield
        finally:
            for table, tensors in before:
                table.update(tensors)

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return self._matrix(self.projections.k)[0].device

    def draw(self, generator: torch.Generator) -> None:
        """Draws weights that give scores of unit size."""
        for rows in self.projections.kinds.values():
            weight, bias = self._matrix(rows)
            heads, width = rows.index.shape
            size = (heads, len(weight), width) if rows.are_read else (heads, width, weight.shape[1] + (bias is not None))
            drawn = torch.randn(size, generator=generator, dtype=weight.dtype).to(weight.device)
            put_heads((weight, bias), rows, drawn / math.sqrt(heads * width if rows.are_read else size[2]))

    def change(self, transform: Transform) -> None:
        """Changes its weights."""
        for kind, become in transform.items():
            rows = self.projections.kinds[kind]
            put_heads(self._matrix(rows), rows, become(read_heads(self._model, rows)))

    def _matrix(self, rows: HeadRows) -> tuple[Tensor, Tensor | None]:
        return matrix_of(self._model.get_submodule(rows.linear))

    def __call__(self) -> Tensor:
        """Returns the output of the consumer layer of its heads, `[calls * tokens, hidden]`."""
        outputs, inputs, attended = list[Tensor](), list[Tensor](), list[Tensor]()

        def attend(
            function: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *rest: Tensor | None, **options: object
        ) -> Any:  # noqa: ANN401
            result = function(module, query, key, *rest, **options)
            as_projected = query.shape[1] == len(self.projections.q.index) and key.shape[3] == self.projections.k.index.shape[1]
            if module in self._module.modules():  # other threads may run other models
                attended.append(result[0] if as_projected else result[0][:0])
            return result

        args, kwargs = tree_map_only((Tensor, Cache), _as_float64, self._call)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(_Float64Numbers())
            linears = list(dict.fromkeys(rows.linear for kind, rows in self.projections.kinds.items() if kind != "o"))
            for number, linear in enumerate(linears):
                hook = partial(_with_noise, number)
                stack.callback(self._model.get_submodule(linear).register_forward_pre_hook(hook).remove)
            reader = self._model.get_submodule(self.projections.o.linear)
            stack.callback(reader.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2))).remove)
            stack.callback(reader.register_forward_hook(lambda _, _args, output: outputs.append(output.flatten(0, -2))).remove)
            stack.enter_context(attention_functions_as(attend))
            self._module(*args, **kwargs)
        read = [rows[:, self.projections.o.index.flatten()] for rows in inputs]
        self.interface = len(attended) == len(read) == 1 and torch.equal(attended[0].flatten(), read[0].flatten())
        return torch.cat(outputs)


class _Float64Numbers(TorchFunctionMode):
    """Creates scalar tensors in float64, as masks use its smallest number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        number = func in (torch.tensor, torch.full) and args and isinstance(args[-1], float)
        return func(*args, **({"dtype": torch.float64} if number else {}) | (kwargs or {}))


def _with_noise(seed: int, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(args[0].device), *args[1:]


def _as_float64(value: Any) -> Any:  # noqa: ANN401 - a tensor or a cache
    if isinstance(value, Cache):  # which the call writes to
        return copy.deepcopy(value)
    tensor = value.detach().to(float64_device(value.device))
    tensor = tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor  # a probe draws other weights
    return nn.Parameter(tensor, requires_grad=False) if isinstance(value, nn.Parameter) else tensor


def see_calls(model: nn.Module, projections: Mapping[str, Projections]) -> dict[str, Call]:
    """Returns the arguments of the first call of each attention module, on random tokens."""
    calls: dict[str, Call] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, tree_map_only(Cache, copy.deepcopy, (args, kwargs)))

    text: Any = text_config(model.config)  # type: ignore[arg-type]
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # half of the length that the model is made for, as some lose positions at the start
    length = min([LENGTH, *(max(limit // 2, 1) for limit in limits if type(limit) is int)]) if any(limits) else FEW
    with ExitStack() as stack, torch.no_grad():
        for name in projections:
            hook = partial(note, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(**small_inputs(model, length=length))
    for name in projections:
        if name not in calls:
            raise ValueError(f"{name} is not called as a module, so its heads cannot be recorded")
    return calls


def find_symmetries(model: nn.Module, projections: Mapping[str, Projections]) -> dict[str, Symmetries]:
    """Returns the symmetries of each attention module, by name; the model stays unchanged.

    It runs the model once, and each attention module about four times.
    """
    return {name: _symmetries(probe) for name, probe in _probes(model, projections)}


def keys_mix(model: nn.Module, projections: Mapping[str, Projections], symmetry: Symmetry) -> bool:
    """Returns whether keys may be mixed as a symmetry states."""
    generator = torch.Generator().manual_seed(0)
    for _, attention in _probes(model, projections):
        with attention.as_float64():
            count, width = attention.projections.k.index.shape
            if not _comparing(attention, generator)[1](_mixed_keys, _drawn(count, width, symmetry, generator)):
                return False
    return True


def _probes(model: nn.Module, projections: Mapping[str, Projections]) -> Iterator[tuple[str, AttentionProbe]]:
    """Yields each attention module with the arguments that the model passes, by name."""
    with evaluating_without_grad(model), attention_for_all_dtypes(model):  # modules compute in float64
        calls = see_calls(model, projections)
        for name, attention in projections.items():
            store_of(model).load(model.get_submodule(name))
            yield name, AttentionProbe(model, attention, calls[name])


Same = Callable[[Transform, Transform], bool]
Passes = Callable[[Callable[[Tensor, int], Transform], Tensor], bool]


def _comparing(attention: AttentionProbe, generator: torch.Generator) -> tuple[Same, Passes]:
    """Draws weights, and returns tests whether a change of heads keeps the outputs."""
    queries = attention.projections.queries
    attention.draw(generator)
    expected = attention()

    def same(transform: Transform, inverse: Transform) -> bool:
        attention.change(transform)
        output = attention()
        attention.change(inverse)
        return bool((output - expected).double().norm() <= TOLERANCE * expected.double().norm())

    def passes(mix: Callable[[Tensor, int], Transform], matrix: Tensor) -> bool:
        matrix = matrix.to(attention.device)
        return same(mix(matrix, queries), mix(torch.linalg.inv(matrix), queries))

    return same, passes


def _symmetries(attention: AttentionProbe) -> Symmetries:
    generator, projections = torch.Generator().manual_seed(0), attention.projections
    queries = projections.queries
    with attention.as_float64():
        same, passes = _comparing(attention, generator)
        (count, width), (_, value_width) = projections.k.index.shape, projections.v.index.shape
        # another factor for each head, which no norm over all heads lets pass
        factors = torch.linspace(0.5, 2, count, dtype=torch.float64)[:, None, None] * torch.eye(width, dtype=torch.float64)
        options = candidates(width) if passes(_mixed_keys, factors) else ()
        keys = next((option for option in options if passes(_mixed_keys, _drawn(count, width, option, generator))), ())
        values = (Mixing(tuple(range(value_width))),)
        mixed = passes(_mixed_values, _drawn(count, value_width, values, generator))
        order, back = [*range(1, count), 0], [count - 1, *range(count - 1)]
        ordered = same(_reordered(order, queries), _reordered(back, queries))
        return Symmetries(keys, values if mixed else (), ordered, attention.interface)


def in_order(tensors: HeadTensors, order: Sequence[int]) -> HeadTensors:
    """Returns reordered KV heads, or some of them, with their query heads."""
    picks = _reordered(order, len(tensors.q) // len(tensors.k))
    return HeadTensors(**{kind: pick(vars(tensors)[kind]) for kind, pick in picks.items()})


def _reordered(order: Sequence[int], queries: int) -> Transform:
    """Reorders KV heads, or selects some of them, with their query heads."""
    kv_heads, query_heads = list(order), [head * queries + query for head in order for query in range(queries)]
    pick_kv, pick_query = itemgetter(kv_heads), itemgetter(query_heads)
    return {"q": pick_query, "k": pick_kv, "v": pick_kv, "o": pick_query}


def _drawn(count: int, width: int, symmetry: Symmetry, generator: torch.Generator) -> Tensor:
    """Draws for each head a matrix of a symmetry."""
    matrices = torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
    for matrix in torch.split(matrices, 1):
        for mixing in symmetry:
            mixing.put(matrix, mixing.draw(generator))
    return matrices


def _mixed_keys(matrix: Tensor, queries: int) -> Transform:
    """Multiplies keys by a matrix, and queries by the transpose of its inverse."""
    inverse = torch.linalg.inv(matrix).transpose(1, 2).repeat_interleave(queries, 0)
    return {"k": lambda k: matrix @ k, "q": lambda q: inverse @ q}


def _mixed_values(matrix: Tensor, queries: int) -> Transform:
    """Multiplies values by a matrix, and output columns by its inverse."""
    inverse = torch.linalg.inv(matrix).repeat_interleave(queries, 0)
    return {"v": lambda v: matrix @ v, "o": lambda o: o @ inverse}
