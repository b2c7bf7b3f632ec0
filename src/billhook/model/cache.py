"""Caches results for models with the same signature."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PretrainedConfig

Finding = TypeVar("Finding")
MOST = 256  # number of cached results: the config search builds dozens of models per shape
# Without it half of a short fit is spent on finding the same again. A finding is bytes, so that whatever a caller does to it does
# not reach the next. Each operation on the dictionary is atomic, so that threads need no lock.
_findings: OrderedDict[Hashable, bytes] = OrderedDict()


def cached(find: Callable[[], Finding], subject: nn.Module | tuple[object, ...], *more: Hashable) -> Finding:
    """Returns the result of `find`, cached by model signature.

    Args:
        find: Computes the result, which must be picklable and depend only on the signature and `more`.
        subject: The model, or a class and a config.
        more: The name of the result, and other values that it depends on.
    """
    model_signature = signature(subject)
    if model_signature is None:
        return find()
    key = model_signature, more, torch.get_default_dtype()
    pickled = _findings.pop(key, None)
    if pickled is None:
        result = find()
        try:
            pickled = pickle.dumps(result)
        except RecursionError:  # some axes are made of thousands of others
            return result
    else:
        result = pickle.loads(pickled)
    _findings[key] = pickled  # behind all others: the first is the one that was asked for longest ago
    if len(_findings) > MOST:
        _findings.popitem(last=False)
    return result


def clear_cache() -> None:
    """Clears the cache. Needed only if model code other than a class's `forward` was replaced."""
    _findings.clear()


def signature(subject: nn.Module | tuple[object, ...]) -> Hashable | None:
    """Returns everything that determines how a model runs on meta tensors.

    It contains the class and `forward` of each module, plain attributes, the config, and the size, strides, dtype,
    trainability, and aliases of each tensor. Values, devices, and modes are not included.

    It is None if something unknown may matter: hooks (unless they keep shapes), an instance's own `forward`, tensors that are
    quantized, sharded, or neither parameters nor buffers, or an attribute that is not a plain value.
    """
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    written = io.BytesIO()
    pickler = _Signature(written)
    try:
        pickler.dump(subject)
    except Exception:  # whatever a class raises that cannot be pickled
        return None
    return blake2b(written.getvalue()).digest(), tuple(pickler.code)


UNSEEN = {*vars(nn.Module()), "_compiled_call_impl"}
"""Attributes of a module that do not affect how it runs, or are handled separately."""
PLAIN = PretrainedConfig, partial, Enum, complex, dict, torch.dtype, torch.device, torch.Size
"""Classes whose pickles identify their values."""


class _Signature(pickle.Pickler):
    """Pickles a model without tensor values; raises an error for unknown objects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # by value, not by identity: equal models are built from different strings
        self.code: dict[ReferenceType[Any], int] = {}  # classes and functions, and the numbers that stand for them
        self.tensors: dict[int, int] = {}  # by their ids: one that several modules hold has one number

    def persistent_id(self, value: Any) -> object:  # noqa: ANN401 - any attribute
        """Returns the substitute of a module or code; None for other values."""
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return "code", self.code.setdefault(ref(value), len(self.code))
        if not isinstance(value, nn.Module):
            return "unseen" if isinstance(value, GenerationConfig | RemovableHandle) else None
        for hook in (*value._forward_pre_hooks.values(), *value._forward_hooks.values()):
            if not _keeps_shapes(hook):
                raise TypeError("hooks may decide how the model runs")
        tensors = []
        for name, tensor in (value._parameters | value._buffers).items():
            if tensor is not None:
                if type(tensor) not in (Tensor, nn.Parameter):
                    raise TypeError("more than its shape may decide how the model runs")
                number = self.tensors.setdefault(id(tensor), len(self.tensors))
                tensors.append((name, number, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad))
        plain = {name: part for name, part in vars(value).items() if name not in UNSEEN and not _keeps_shapes(part)}
        return type(value), type(value).forward, plain, tensors, value._modules

    def reducer_override(self, value: Any) -> Any:  # noqa: ANN401 - of a class that is not built in
        """Refuses classes that may be large, or whose pickles may be incomplete."""
        if isinstance(value, PLAIN) or is_dataclass(value):
            return NotImplemented
        raise TypeError("whatever this holds may decide how the model runs")


def _keeps_shapes(value: object) -> bool:
    """Returns whether a value declares that it does not affect runs on meta tensors."""
    return getattr(type(value), "keeps_shapes", False) is True


class CachedShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes each distinct operation on meta tensors once, as layers repeat."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.repeats: dict[OpOverload, bool] = {}
        self.results: dict[object, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skips torch.compile checks, which meta tensors do not need."""
        return False

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Runs an operation, or returns a tensor like its earlier result."""
        return self.once(func, args, kwargs or {})

    def once(self, func: OpOverload, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Runs an operation, unless its result is cached."""
        if (repeats := self.repeats.get(func)) is None:
            # the shape of the result depends only on the arguments
            schema = func._schema
            plain = not any(part.alias_info for part in (*schema.arguments, *schema.returns))
            returns_tensor = [str(part.type) for part in schema.returns] == ["Tensor"]
            random = torch.Tag.nondeterministic_seeded in func.tags or schema.name in ("aten::_to_copy", "aten::empty")
            repeats = self.repeats[func] = plain and returns_tensor and not random
        key = _key(func, args, kwargs) if repeats else None
        if key is not None and (known := self.results.get(key)) is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if key is not None and out.is_meta:
            self.results[key] = (out.shape, out.stride(), out.dtype)
        return out


def _key(func: OpOverload, args: Any, kwargs: Any) -> object:  # noqa: ANN401
    """Returns everything that determines the shape of a result. None if unknown."""
    parts: list[object] = [func]
    for arg in (*args, *kwargs.items()):
        part: object = (type(arg), arg)
        if isinstance(arg, Tensor):
            part = (arg.shape, arg.stride(), arg.dtype) if arg.is_meta else None
        elif isinstance(arg, list | tuple):
            part = _key(func, arg, {})
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)
