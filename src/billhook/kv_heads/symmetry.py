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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache

from billhook.engine import evaluating_without_grad, store_of, tree_map_only
from billhook.kv_heads.layout import HeadTensors, Projections, put_heads, read
from billhook.linalg import float64_device
from billhook.model import attention_for_all_dtypes, attention_functions_as, matrix_of, small_inputs, text_config

LENGTH = 128
"""Number of tokens: enough to detect slow rotations."""

FEW = 7
"""Number of tokens if the model does not state its maximum length."""

TOLERANCE = 1e-6
"""Largest relative difference of equal outputs: some code computes in float32."""

SHARES = {n / parts for parts in (8, 10) for n in range(1, parts + 1)}
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

    def put(self, matrices: Tensor, mix: Tensor, columns: "Mixing") -> None:
        """Writes matrices that mix these dimensions into `[heads, width, width]`.

        A complex number a + ib as [[a, -b], [b, a]].

        Args:
            matrices: The matrices to change.
            mix: Matrices to write, or a single one.
            columns: Positions of columns.
        """
        r = torch.tensor(self.real)[:, None]
        i = torch.tensor(self.imaginary, dtype=torch.int64)[:, None]
        to_r = torch.tensor(columns.real, dtype=torch.int64)
        to_i = torch.tensor(columns.imaginary, dtype=torch.int64)
        if not self.imaginary:
            matrices[:, r, to_r] = mix
            return
        matrices[:, r, to_r] = matrices[:, i, to_i] = mix.real
        matrices[:, r, to_i] = -mix.imag
        matrices[:, i, to_r] = mix.imag


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""
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


def _candidates(width: int) -> Iterator[Symmetry]:
    """Yields possible symmetries of keys: all dimensions, or rotary pairs and the rest.

    Pairs are half a rotary width apart, or adjacent. Adjacent ones of a wide rotary part pass in a narrow one, too, whose rest
    mixes more, so narrow ones come first.
    """
    yield (Mixing(tuple(range(width))),)
    rotary_widths = sorted({int(width * share) for share in SHARES if width * share % 2 == 0})
    halves = [(rotary, rotary // 2) for rotary in reversed(rotary_widths)]
    for rotary, apart in halves + [(rotary, 1) for rotary in rotary_widths]:
        pairs = [Mixing((first,), (first + apart,)) for first in range(rotary) if first % (2 * apart) < apart]
        yield (*pairs, *([Mixing(tuple(range(rotary, width)))] if rotary < width else []))


def find_symmetries(
    model: nn.Module, projections: Mapping[str, Projections], keys: Sequence[Symmetry] | None = None
) -> dict[str, Symmetries]:
    """Returns the symmetries of each attention module, by name; the model stays unchanged.

    It runs the model once, and each attention module about four times.

    Args:
        model: The model.
        projections: Its attention modules.
        keys: Possible symmetries of keys, the largest first. Defaults to all dimensions, and to rotary pairs.
    """
    symmetries = {}
    with evaluating_without_grad(model), attention_for_all_dtypes(model):  # modules compute in float64
        calls = _first_calls(model, projections)
        for name, attention in projections.items():
            store_of(model).load(model.get_submodule(name))
            with _in_float64([model.get_submodule(part) for part in (name, *attention.linears)]):
                symmetries[name] = _symmetries(model, attention, calls[name], keys)
    return symmetries


def _symmetries(model: nn.Module, projections: Projections, call: Call, keys: Sequence[Symmetry] | None) -> Symmetries:
    count, width = projections.k.index.shape
    _, value_width = projections.v.index.shape
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for kind, heads in vars(read(model, projections)).items():  # of their sizes, and with scores of unit size
        inputs = heads.shape[2] * (len(heads) if kind == "o" else 1)
        drawn[kind] = torch.randn(heads.shape, generator=generator, dtype=heads.dtype).to(heads.device) / math.sqrt(inputs)
    before = HeadTensors(**drawn)
    del heads  # for memory, as below
    attended = []
    modules = set(model.get_submodule(projections.name).modules())

    def attend(
        function: Callable[..., Any], caller: nn.Module, query: Tensor, key: Tensor, *rest: Tensor | None, **options: object
    ) -> Any:  # noqa: ANN401
        result = function(caller, query, key, *rest, **options)
        as_projected = query.shape[1] == len(projections.q.index) and key.shape[3] == projections.k.index.shape[1]
        if caller in modules:  # other threads may run other models
            attended.append(result[0] if as_projected else result[0][:0])
        return result

    _put(model, projections, before)
    with attention_functions_as(attend):
        expected, read_heads = _output(model, projections, call)
    interface = len(attended) == len(read_heads) == 1 and torch.equal(attended[0].flatten(), read_heads[0].flatten())
    attended.clear()
    read_heads.clear()

    def same() -> bool:
        output, _ = _output(model, projections, call)
        return bool((output - expected).norm() <= TOLERANCE * expected.norm())

    def keys_mix(matrices: Tensor) -> bool:
        matrices = matrices.to(before.k.device)
        inverse = torch.linalg.inv(matrices).mT.repeat_interleave(projections.queries, 0)
        _put(model, projections, replace(before, k=matrices @ before.k, q=inverse @ before.q))
        return same()

    # another factor for each head, which no norm over all heads lets pass
    factors = torch.linspace(0.5, 2, count, dtype=torch.float64)[:, None, None] * torch.eye(width, dtype=torch.float64)
    options = (_candidates(width) if keys is None else keys) if keys_mix(factors) else ()
    mixed_keys = next((option for option in options if keys_mix(_drawn(option, count, width, generator))), ())
    values = (Mixing(tuple(range(value_width))),)
    matrices = _drawn(values, count, value_width, generator).to(before.v.device)
    inverse = torch.linalg.inv(matrices).repeat_interleave(projections.queries, 0)
    _put(model, projections, replace(before, v=matrices @ before.v, o=before.o @ inverse))
    values_mix = same()
    _put(model, projections, before.in_order([*range(1, count), 0]))
    return Symmetries(mixed_keys, values if values_mix else (), same(), interface)


def _drawn(symmetry: Symmetry, heads: int, width: int, generator: torch.Generator) -> Tensor:
    """Draws a matrix of a symmetry for each head: well conditioned, not orthogonal."""
    matrices = torch.eye(width, dtype=torch.float64).repeat(heads, 1, 1)
    for mixing in symmetry:
        size = len(mixing.real)
        drawn = torch.randn(2, heads, size, size, generator=generator, dtype=torch.float64)
        unitary = torch.linalg.qr(torch.complex(*drawn) if mixing.imaginary else drawn[0]).Q
        scales = 0.5 + torch.rand(heads, 1, size, generator=generator, dtype=torch.float64)
        mixing.put(matrices, unitary * scales, mixing)
    return matrices


def _put(model: nn.Module, projections: Projections, heads: HeadTensors) -> None:
    """Writes heads into the weights of a module."""
    for kind, rows in projections.kinds.items():
        put_heads(matrix_of(model.get_submodule(rows.linear)), rows, vars(heads)[kind])


def _output(model: nn.Module, projections: Projections, call: Call) -> tuple[Tensor, list[Tensor]]:
    """Runs a module on noise; returns `[calls * tokens, hidden]`, and heads."""
    outputs = []
    read_heads = []
    module = model.get_submodule(projections.name)
    reader = model.get_submodule(projections.o.linear)

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        read_heads.append(args[0].flatten(0, -2)[:, projections.o.index.flatten()])
        outputs.append(output.flatten(0, -2))

    args, kwargs = tree_map_only((Tensor, Cache), _as_float64, call)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(matrix_of(reader)[0].device.type, enabled=False))
        stack.enter_context(_Float64Numbers())
        for number, linear in enumerate(dict.fromkeys(rows.linear for rows in (projections.q, projections.k, projections.v))):
            stack.callback(model.get_submodule(linear).register_forward_pre_hook(partial(_with_noise, number)).remove)
        stack.callback(reader.register_forward_hook(record).remove)
        module(*args, **kwargs)
    return torch.cat(outputs).double(), read_heads


@contextmanager
def _in_float64(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Runs modules in float64 within a `with` block; on the CPU if need be.

    Their tensors are replaced, because a parameter whose dtype changes would lose the gradient hooks of DDP.
    """
    modules = dict.fromkeys(module for root in roots for module in root.modules())
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


def _first_calls(model: nn.Module, projections: Mapping[str, Projections]) -> dict[str, Call]:
    """Returns the arguments of the first call of each attention module, on random tokens."""
    calls: dict[str, Call] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, tree_map_only(Cache, copy.deepcopy, (args, kwargs)))

    text = text_config(model.config)  # type: ignore[arg-type]
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # half of the length that the model is made for, as some lose positions at the start
    length = min([LENGTH, *(max(limit // 2, 1) for limit in limits if type(limit) is int)]) if any(limits) else FEW
    with ExitStack() as stack:
        for name in projections:
            hook = model.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        model(**small_inputs(model, length=length))
    for name in projections:
        if name not in calls:
            raise ValueError(f"{name} is not called as a module, so its heads cannot be recorded")
    return calls
