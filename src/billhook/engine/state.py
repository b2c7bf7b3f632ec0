"""States of torch and of modules that hold for a while: modes, random numbers, precision, other attributes and other values."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Has autocast cast parameters again within, and once more afterwards, so that no copy of other values is computed with.

    Whatever puts other values into a parameter for a while, or for good, does it within such a block.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Raises a `KeyboardInterrupt` that comes within only at the end, when all has been done.

    Python runs signal handlers in the main thread alone, so that nothing is to be done in another one.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:  # None: Python did not set it
        yield
        return
    came = list[int]()
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


OPEN = "_overridden"
"""The name under which an object holds the blocks that are open, in the order in which they were entered."""


@dataclass(eq=False)
class _Block:
    """The attributes that a block gives, and those that were there before."""

    given: dict[str, Any]
    before: dict[str, Any]


@contextmanager
def overridden(owner: object, **attributes: object) -> Iterator[None]:
    """Gives an object other attributes within the block; afterwards it has its own again, or its class's if it had none.

    Modules do not register what is given. Blocks may be nested, and may also end in another order than they began, as those of
    runs that rest in turn (`Walk`) do.

    >>> from torch import nn
    >>> model = nn.Identity()
    >>> with overridden(model, forward=lambda x: 2 * x):
    ...     model(3)
    6
    >>> model(3)
    3
    """
    own = vars(owner)
    blocks: list[_Block] = own.setdefault(OPEN, [])
    mine = _Block(attributes, {name: own[name] for name in attributes if name in own})
    blocks.append(mine)
    own.update(attributes)
    try:
        yield
    finally:
        later = blocks[blocks.index(mine) + 1 :]
        for name in attributes:
            inner = next((block.before for block in later if name in block.given), own)
            inner.pop(name, None)
            inner.update({name: mine.before[name]} if name in mine.before else {})
        blocks.remove(mine)
        if not blocks:
            del own[OPEN]


@contextmanager
def replaced(new: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Puts other values instead of modules' own parameters, given by module and by their name in it; the old ones come back.

    Values that lie elsewhere come to where the parameters are.
    """
    pairs = [(module.get_parameter(name), value) for module, own in new.items() for name, value in own.items()]
    old = [parameter.data for parameter, _ in pairs]
    with fresh_casts():
        try:
            for parameter, value in pairs:
                parameter.data = value if parameter.is_meta else value.to(parameter.device)
            yield
        finally:
            with uninterrupted():
                for (parameter, _), value in zip(pairs, old, strict=True):
                    parameter.data = value


PROBLEM = "problem_type"
"""What a classifier's forward writes into its config, by the labels that it is given."""


@dataclass(frozen=True)
class Ambient:
    """The state that torch keeps for a whole thread, although each run sets it for itself; by default, what arithmetic needs."""

    gradients: bool = False
    dtype: torch.dtype = torch.float32
    precision: tuple[str, str, str] = ("highest", "ieee", "ieee")  # of products of float32 matrices; see `_precision`
    autocast: tuple[tuple[str, bool, torch.dtype | None], ...] = ()  # by kind of device, whether it is on and to which dtype

    @classmethod
    def now(cls) -> "Ambient":
        """Returns the state that is set now."""
        kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()]
        return cls(torch.is_grad_enabled(), torch.get_default_dtype(), _precision(), tuple(kinds))

    def restore(self) -> None:
        """Sets it again."""
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
        _set_precision(*self.precision)
        for kind, enabled, dtype in self.autocast or [(kind, False, None) for kind in _kinds()]:
            torch.set_autocast_enabled(kind, enabled)
            if dtype is not None:
                torch.set_autocast_dtype(kind, dtype)


def _kinds() -> set[str]:
    accelerator = torch.accelerator.current_accelerator()
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}


def _precision() -> tuple[str, str, str]:
    """Returns the precision of float32 products as torch's old setting says it, and as the new ones for cuda and mkldnn do.

    The new ones follow the old one, but not the other way round: where they contradict it, torch refuses to read the old one.
    One that says the same as its whole backend is `"none"`: it goes on to follow that.
    """
    backends: Any = torch.backends
    cuda, mkldnn = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    cuda = "none" if cuda == backends.cudnn.fp32_precision else cuda  # which is that of all of cuda
    mkldnn = "none" if mkldnn == backends.mkldnn.fp32_precision else mkldnn
    try:
        return torch.get_float32_matmul_precision(), cuda, mkldnn
    except RuntimeError:
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "ieee"  # which contradicts none
        old = torch.get_float32_matmul_precision()
        _set_precision(old, cuda, mkldnn)
        return old, cuda, mkldnn


def _set_precision(old: str, cuda: str, mkldnn: str) -> None:
    torch.set_float32_matmul_precision(old)  # which sets the others, too
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = cuda, mkldnn


@contextmanager
def precisely() -> Iterator[None]:
    """Computes products in full precision until the end of a `with` block, whatever the run has set."""
    own = Ambient.now()
    Ambient().restore()
    try:
        yield
    finally:
        own.restore()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates without gradients, key-value cache or compiled code; restores modes, random numbers and configs afterwards."""
    with resting(model), torch.no_grad():
        yield


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Evaluates without dropout, key-value cache or compiled code; restores modes, random numbers and configs afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {id(m.config): m.config for m in modes if getattr(getattr(m, "config", None), "use_cache", False)}
    others = {id(m.config): vars(m.config) for m in modes if isinstance(getattr(m, "config", None), PretrainedConfig)}
    problems = [(fields, fields[PROBLEM]) for fields in others.values() if PROBLEM in fields]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        for config in configs.values():
            config.use_cache = False
        model.train()  # some then forget what they have computed from parameters, as LeViT its position biases
        model.eval()
        with fresh_casts(), torch.random.fork_rng(devices, device_type=kind), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in configs.values():
            config.use_cache = True
        for fields, problem in problems:
            fields[PROBLEM] = problem
