"""States of torch and of modules that hold for a while: modes, random numbers, precision, other attributes and other values."""

import hashlib
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


class StepRandom:
    """Random numbers of each step, from a seed, the step and the process: a resumed run draws as the straight run does."""

    def __init__(self) -> None:
        self.seed: int | None = None

    def draw(self) -> int:
        """Returns the seed; draws it at first from where torch's own random numbers are, which stay there."""
        if self.seed is None:
            with torch.random.fork_rng(devices=[]):
                self.seed = int(torch.randint(2**62, ()))
        return self.seed

    @contextmanager
    def drawn(self, device: torch.device, step: int, rank: int) -> Iterator[None]:
        """Has torch draw from the numbers of a step within the block, on the CPU and this device."""
        seed = int.from_bytes(hashlib.blake2b(f"{self.draw()} {step} {rank}".encode(), digest_size=7).digest(), "big")
        with seeded(seed, device):
            yield

    def state_dict(self) -> dict[str, int]:
        """Returns the seed, once there is one."""
        return {} if self.seed is None else {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on with that seed."""
        self.seed = state.get("seed")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Has torch draw from the numbers of a seed within the block, on the CPU and this device."""
    with forked(device):
        torch.default_generator.manual_seed(seed)
        if _has_own(device):
            with torch.accelerator.device_index(device.index):
                torch.get_device_module(device).manual_seed(seed)
        yield


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Has torch's random numbers, on the CPU and a device, go on after the block as if nothing had been drawn within."""
    devices, kind = ([device], device.type) if _has_own(device) else ([], "cpu")
    forking: AbstractContextManager[None] = torch.random.fork_rng(devices, device_type=kind)
    return forking


def _has_own(device: torch.device) -> bool:
    """Tells whether a device has random numbers of its own."""
    return device.type not in ("cpu", "meta")


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the random numbers of torch (on the CPU and a device), Python and NumPy, as plain data and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    # checkpoints load by `weights_only`, which knows tensors and no arrays, and torch has no arithmetic on uint32
    numpy = (name, torch.from_numpy(np.asarray(keys).astype("int64")), *rest)
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    return state | ({device.type: torch.get_device_module(device).get_rng_state(device)} if _has_own(device) else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Goes on from there."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
    if _has_own(device) and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
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

    attributes: dict[str, Any]
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
    fields = vars(owner)
    blocks: list[_Block] = fields.setdefault(OPEN, [])
    mine = _Block(attributes, {name: fields[name] for name in attributes if name in fields})
    blocks.append(mine)
    fields.update(attributes)
    try:
        yield
    finally:
        later = blocks[blocks.index(mine) + 1 :]
        for name in attributes:
            # where a later block gives the same and is still open, it is that block which is to leave what was here before
            inner = next((block.before for block in later if name in block.attributes), fields)
            inner.pop(name, None)
            inner.update({name: mine.before[name]} if name in mine.before else {})
        blocks.remove(mine)
        if not blocks:
            del fields[OPEN]


@contextmanager
def replaced(new: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Puts other values instead of modules' own parameters, given by module and by their name in it; the old ones come back.

    Values that lie elsewhere come to where the parameters are.
    """
    pairs = [(module.get_parameter(name), value) for module, values in new.items() for name, value in values.items()]
    old = [parameter.data for parameter, _ in pairs]
    with fresh_autocast_cache():
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
class TorchState:
    """The state that torch keeps for a whole thread, although each run sets it for itself; by default, what arithmetic needs."""

    gradients: bool = False
    dtype: torch.dtype = torch.float32
    precision: tuple[str, str, str] = ("highest", "ieee", "ieee")  # of products of float32 matrices; see `_precision`
    autocast: tuple[tuple[str, bool, torch.dtype | None], ...] = ()  # by kind of device, whether it is on and to which dtype

    @classmethod
    def now(cls) -> "TorchState":
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
def full_precision() -> Iterator[None]:
    """Computes products in full precision until the end of a `with` block, whatever the run has set."""
    before = TorchState.now()
    TorchState().restore()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def evaluating_without_grad(model: nn.Module) -> Iterator[None]:
    """Evaluates without gradients, key-value cache or compiled code; restores modes, random numbers and configs afterwards."""
    with evaluating(model), torch.no_grad():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluates without dropout, key-value cache or compiled code; restores modes, random numbers and configs afterwards."""
    modes = {module: module.training for module in model.modules()}
    caching, problems = dict[int, Any](), dict[int, tuple[dict[str, Any], object]]()
    for module in modes:
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            caching[id(config)] = config
        if isinstance(config, PretrainedConfig) and PROBLEM in vars(config):
            problems[id(config)] = vars(config), vars(config)[PROBLEM]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        for config in caching.values():
            config.use_cache = False
        model.train()  # some then forget what they have computed from parameters, as LeViT its position biases
        model.eval()
        # eager: compiled code would not call forwards that are replaced for the run, nor hooks that came after it was compiled
        with fresh_autocast_cache(), torch.random.fork_rng(devices, device_type=kind), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in caching.values():
            config.use_cache = True
        for fields, problem in problems.values():
            fields[PROBLEM] = problem
