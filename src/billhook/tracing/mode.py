"""Runs a model on meta tensors, computes small constants, and applies operation rules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from billhook.engine import tree_map_only
from billhook.model import CachedShapes
from billhook.tracing.axes import Axis, Irregular, mark, product
from billhook.tracing.rules import rule_for
from billhook.tracing.rules.indexing import index
from billhook.tracing.tape import (
    SMALL,
    Note,
    Tape,
    apply_pending,
    axes_of,
    broadcast,
    join,
    keep_order,
    memory_of,
    note,
    record,
    running_module,
    tensor_args,
    tensors,
)


def _nonzero(x: Tensor, everything: bool) -> Tensor:
    """Returns the positions of all entries, or of the first: `[entries, dimensions]`."""
    axes = axes_of(x)
    entries = Axis(1)
    out = torch.zeros(1, x.dim(), dtype=torch.int64)
    if everything:
        positions = torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).reshape(-1, x.dim())
        keep_order(axes, "the code asks where along it something is")
        entries = product(axes)
        out = positions if positions.numel() <= SMALL else positions.to("meta")
    record(out, [entries, Axis(x.dim())], [x], points=axes[0] if x.dim() == 1 else None).columns = tuple(axes)
    return out


def _all_selected(tape: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """Returns x[mask] as if the mask were True everywhere."""
    broadcast(x.shape, [x, mask])
    keep_order(axes_of(x), "the code picks along it by a mask")
    out = x.flatten().clone()
    record(out, [product(axes_of(x))], [x, mask], note(x).points)
    return out


def _all_indexed(tape: Tape, x: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """Returns x[..., mask] as if the mask were True everywhere; None without a mask."""
    tensors = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(tensors) != 1 or tensors[0][1].dtype != torch.bool:
        return None
    d, mask = tensors[0]
    out = x.flatten(d, d + mask.dim() - 1).clone()
    index(tape, out, x, indices)
    return out


TAKEN_IN_FULL: dict[str, Callable[..., Tensor | None]] = {"masked_select": _all_selected, "index": _all_indexed}
FACTORIES = {"arange", "zeros", "ones", "full", "scalar_tensor", "linspace", "tril_indices", "triu_indices", "eye"}
IRREGULAR = (Irregular, TypeError, LookupError, ValueError, AttributeError, ZeroDivisionError, AssertionError)


class Op:
    """Facts that are the same for every call of an operation.

    Attributes:
        writes: Arguments that it writes to: position and name.
        reshapes: True if it changes the shape of its argument in place.
    """

    def __init__(self, func: OpOverload) -> None:
        schema = func._schema
        self.name = schema.name.removeprefix("aten::")
        self.rule = rule_for(func)
        self.writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        self.reshapes = torch.Tag.inplace_view in func.tags


class Recorder(CachedShapes):  # type: ignore[no-untyped-call]
    """Applies the rule of each operation that a model runs; see `recording`."""

    def __init__(self, tape: Tape, model: nn.Module, everything: bool = True) -> None:
        super().__init__()
        self.tape = tape
        self.model = model
        self.everything = everything
        self.ops: dict[OpOverload, Op] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Runs an operation, then records its axes."""
        kwargs = kwargs or {}
        if (op := self.ops.get(func)) is None:
            op = self.ops[func] = Op(func)
        self.tape.op = name = op.name
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return self._fetch(args[0], kwargs.get("dtype"))
        for x in tensor_args(args, kwargs):
            self._introduce(x)
        if name == "nonzero":
            self._assume(f"nonzero: {'every' if self.everything else 'one'} entry is taken")
            return _nonzero(args[0], self.everything)
        if name in TAKEN_IN_FULL and (out := TAKEN_IN_FULL[name](self.tape, *args)) is not None:
            self._assume(f"{name}: every entry is taken")
            return out
        before_reshape = args[0].detach() if op.reshapes else None  # a view with the shape before
        if before_reshape is not None:
            before_reshape._billhook = note(args[0])
        out, args, kwargs = self._do(func, op, args, kwargs)
        args = args if before_reshape is None else (before_reshape, *args[1:])
        written = [(x, axes_of(x), self.tape.value(x)) for x in _written(op, args, kwargs)]
        self._note(op, out, args, kwargs)
        value = _value(self.tape, func, name, out, args, kwargs) if isinstance(out, Tensor) else None
        for x, axes, before in written:
            for a, b in zip(axes, axes_of(x), strict=True):
                join(a, b)
            if before is not None and value is None:
                self.tape.overwritten[memory_of(before)] = before
        if value is not None:
            note(out).value = value
        return out

    def _do(self, func: OpOverload, op: Op, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:  # noqa: ANN401
        """Runs an operation on meta, moving arguments there first if needed."""
        try:
            return self.once(func, args, kwargs), args, kwargs
        except RuntimeError as error:
            if "device" not in str(error):
                raise
            if any(not x.is_meta for x in _written(op, args, kwargs)):
                reason = "a tensor on the CPU is written to; the code should make it on the device of its input"
                raise NotImplementedError(reason) from error
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            return func(*args, **kwargs), args, kwargs

    def _introduce(self, x: Tensor) -> None:
        """Records the axes of a tensor without a producer: a constant, or a view of a parameter."""
        if (known := getattr(x, "_billhook", None)) is not None and len(known.axes) == x.dim():
            return
        parameter = self.tape.parameters.get(self.tape.storages.get(memory_of(x), ""))
        if parameter is not None:  # a full view has the parameter's dimensions in some order
            known_dims, dims = (list(zip(t.shape, t.stride(), strict=True)) for t in (parameter, x))
            order = [known_dims.index(dim) for dim in dims if dim in known_dims]
            if known_dims == dims or sorted(order) == list(range(parameter.dim())) == list(range(x.dim())):
                axes = axes_of(parameter)
                record(x, axes if known_dims == dims else [axes[d] for d in order], [parameter], applied=True)
                return
        notes = {"const": "a tensor that is neither parameter, buffer nor input"}
        record(x, [Axis(n, notes=notes) for n in x.shape], []).active = True

    def _note(self, op: Op, out: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        if op.rule is None:
            self._give_up(f"no rule for the op {op.name}", out, args, kwargs)
            return
        try:
            op.rule(self.tape, out, *args, **{key: value for key, value in kwargs.items() if key != "out"})
        except IRREGULAR as error:
            self._give_up(f"the op {op.name} is irregular here: {error}", out, args, kwargs)

    def _give_up(self, reason: str, out: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        """Marks everything that an untraceable operation touches as not prunable."""
        inputs = tensors((args, kwargs))
        reason = f"{reason}, in {running_module(self.model)}"
        self.tape.misses[reason] += 1
        for tensor in [*inputs, *tensors(out)]:
            apply_pending(note(tensor))
            for axis in axes_of(tensor):
                mark(axis, "opaque", reason)
        for result in tensors(out):
            if not any(result is tensor for tensor in inputs):
                record(result, [Axis(n, notes={"opaque": reason}) for n in result.shape], inputs)

    def _read(self, x: Tensor) -> Any:  # noqa: ANN401 - a Python number
        """Returns a tensor's known value, or a value that makes conditions true."""
        apply_pending(note(x))
        if (value := self.tape.value(x)) is not None:
            return value.item()
        self._assume("a value is asked for: taken as true, or 1")
        return True if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1

    def _fetch(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Returns known values, or ones, to code that copies a tensor to the CPU."""
        if (value := self.tape.value(x)) is None:
            self._assume("values are fetched to the CPU: taken as ones")
            value = torch.ones(x.shape, dtype=x.dtype)
            for axis in axes_of(x):
                mark(axis, "const", "the code asks for the values along it")
        out = value.to(dtype or x.dtype, copy=True)
        record(out, axes_of(x), [x], note(x).points)
        return out

    def _assume(self, assumption: str) -> None:
        assumption = f"{assumption}, in {running_module(self.model)}"
        self.tape.assumed[assumption] += 1


class _Attention(TorchFunctionMode):
    """Raises for attention without KV heads, which makes torch 2.10 divide by zero and crash."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            key = args[1] if len(args) > 1 else kwargs["key"]
            if key.dim() > 3 and not key.shape[-3]:
                raise ValueError("attention has no key/value heads")
        return func(*args, **kwargs)


def _to_meta(tensor: Tensor) -> Tensor:
    """Moves a constant of the model's code to meta and keeps its values."""
    if tensor.is_meta:
        return tensor
    moved = tensor.to("meta")
    before = note(tensor)
    new = Note(list(before.axes), before.active, before.points, value=tensor if tensor.numel() <= SMALL else None)
    moved._billhook = new  # type: ignore[attr-defined]
    return moved


def _written(op: Op, args: Any, kwargs: Any) -> list[Tensor]:  # noqa: ANN401
    return tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in op.writes])


def _value(tape: Tape, func: OpOverload, name: str, out: Tensor, args: Any, kwargs: Any) -> Tensor | None:  # noqa: ANN401
    """Computes a small result if all of its inputs are known."""
    known = []

    def value_of(x: Any) -> Any:  # noqa: ANN401
        if isinstance(x, Tensor):
            value = tape.value(x)
            known.append(value is not None)
            return value
        return [value_of(item) for item in x] if isinstance(x, list | tuple) else x

    values = []
    for x in args:
        values.append(value_of(x))
        if not all(known):
            return None
    if (not known and name not in FACTORIES) or out.numel() > SMALL:
        return None
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    try:
        result = func(*values, **{key: value_of(x) for key, x in kwargs.items()})
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return result if isinstance(result, Tensor) and all(known) and result.shape == out.shape else None


@contextmanager
def recording(tape: Tape, model: nn.Module, everything: bool = True) -> Iterator[None]:
    """Records the axes of all operations that a model runs within a `with` block.

    It runs without gradients, compiled code, and torch's fused encoder layers. Code that asks for nonzero entries gets all of
    them if `everything`, otherwise the first.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    replaced = vars(torch.Tensor).get("__getitem__")
    get = torch.Tensor.__getitem__

    def visible(x: Tensor, index: Any) -> Tensor:  # noqa: ANN401 - whatever a tensor can be indexed with
        # torch would make tensors of index lists without dispatching them
        if isinstance(index, tuple) and any(isinstance(i, list) for i in index):
            index = tuple(torch.tensor(i) if isinstance(i, list) and i and type(i[0]) is int else i for i in index)
        return get(x, index)

    torch.backends.mha.set_fastpath_enabled(False)  # a fused op would hide the products of a layer
    torch.Tensor.__getitem__ = visible  # type: ignore[method-assign, assignment]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Attention(), Recorder(tape, model, everything):
            yield
    finally:
        if replaced is None:
            del torch.Tensor.__getitem__  # restores the inherited method
        else:
            torch.Tensor.__getitem__ = replaced  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fused)
