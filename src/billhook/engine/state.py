"""Temporary states of torch and of modules: modes, random state, precision, and values."""

import hashlib
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

LOADING = threading.RLock()  # lock of `one_thread`, which nested calls take again
PROBLEM = "problem_type"  # config field that a classifier's forward sets from its labels
OPEN = "_overridden"  # attribute of an object with its open `overridden` contexts, in order of entry


class StepRandom:
    """Random numbers by seed, step, and rank, identical in resumed runs."""

    def __init__(self) -> None:
        self.seed: int | None = None

    def draw(self) -> int:
        """Returns the seed. On the first call, it is drawn without changing torch's state."""
        if self.seed is None:
            with torch.random.fork_rng(devices=[]):
                self.seed = int(torch.randint(2**62, ()))
        return self.seed

    @contextmanager
    def drawn(self, device: torch.device, step: int, rank: int) -> Iterator[None]:
        """Uses the random numbers of a step within the context, on the CPU and a device."""
        seed = int.from_bytes(hashlib.blake2b(f"{self.draw()} {step} {rank}".encode(), digest_size=7).digest(), "big")
        with seeded(seed, device):
            yield

    def state_dict(self) -> dict[str, int]:
        """Returns the seed, if it has been drawn."""
        return {} if self.seed is None else {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues with a saved seed."""
        self.seed = state.get("seed")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Uses the random numbers of a seed within the context, on the CPU and a device."""
    with forked(device):
        seed_random_state(seed, device)
        yield


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state of the CPU and a device after the context."""
    devices, kind = ([device], device.type) if _has_own(device) else ([], "cpu")
    return torch.random.fork_rng(devices, device_type=kind)


def seed_random_state(number: int, device: torch.device) -> None:
    """Seeds torch on the CPU and a device; `torch.manual_seed` seeds all devices."""
    torch.default_generator.manual_seed(number)
    if _has_own(device):
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(number)


def _has_own(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the random state of torch, Python, and NumPy as plain data and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    # `weights_only` loads tensors but not arrays, and torch has no uint32 arithmetic
    numpy = (name, torch.from_numpy(np.asarray(keys).astype("int64")), *rest)
    return {"python": random.getstate(), "numpy": numpy, **torch_state(device)}


def torch_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the random state of torch, on the CPU and a device."""
    state = {"torch": torch.get_rng_state()}
    return state | ({device.type: torch.get_device_module(device).get_rng_state(device)} if _has_own(device) else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores a random state."""
    set_torch_state(state, device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))


def set_torch_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores the random state of torch, on the CPU and a device."""
    torch.set_rng_state(state["torch"].cpu())
    if _has_own(device) and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Clears autocast's cache of low-precision parameters before and after the context.

    Every change of parameter values, temporary or not, must happen within it.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays a `KeyboardInterrupt` to the end of the context.

    Python runs signal handlers only in the main thread, so other threads need no handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:  # None: Python did not set it
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@dataclass(eq=False)
class _Block:
    """The attributes that a context sets, and the previous ones."""

    attributes: dict[str, Any]
    before: dict[str, Any]


@contextmanager
def overridden(owner: object, **attributes: object) -> Iterator[None]:
    """Overrides attributes of an object within the context, and then restores them.

    Modules do not register the values. Contexts may be nested, and may end in another order, as in paused runs of a `Walk`.

    >>> from torch import nn
    >>> model = nn.Identity()
    >>> with overridden(model, forward=lambda x: 2 * x):
    ...     model(3)
    6
    >>> model(3)
    3
    """
    fields = vars(owner)
    blocks = fields.setdefault(OPEN, [])
    mine = _Block(attributes, {name: fields[name] for name in attributes if name in fields})
    blocks.append(mine)
    fields.update(attributes)
    try:
        yield
    finally:
        later = blocks[blocks.index(mine) + 1 :]
        for name in attributes:
            # if a later open context overrides the same name, it must restore the previous value
            inner = next((block.before for block in later if name in block.attributes), fields)
            inner.pop(name, None)
            inner.update({name: mine.before[name]} if name in mine.before else {})
        blocks.remove(mine)
        if not blocks:
            del fields[OPEN]


@contextmanager
def replaced(new: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Replaces parameter values within the context, by module and by name in the module.

    Values on other devices are moved to the parameter's device. A module without parameters, whose weight is a view of another's
    parameter, must compute with its attributes of these names instead.
    """
    pairs = []
    with fresh_autocast_cache(), ExitStack() as stack:
        for module, values in new.items():
            parameters = {name: module.get_parameter(name) for name in values}
            moved = {
                name: value if parameters[name].is_meta else value.to(parameters[name].device) for name, value in values.items()
            }
            if module._parameters:
                pairs += [(parameters[name], value) for name, value in moved.items()]
            else:
                stack.enter_context(overridden(module, **moved))
        before = [parameter.data for parameter, _ in pairs]
        try:
            for parameter, value in pairs:
                parameter.data = value
            yield
        finally:
            with uninterrupted():
                for (parameter, _), value in zip(pairs, before, strict=True):
                    parameter.data = value


@dataclass(frozen=True)
class TorchState:
    """Thread-wide torch state that runs may change. The default is full precision."""

    gradients: bool = False
    dtype: torch.dtype = torch.float32
    precision: tuple[str, str, str] = ("highest", "ieee", "ieee")  # of products of float32 matrices; see `_precision`
    autocast: tuple[tuple[str, bool, torch.dtype | None], ...] = ()  # by kind of device, whether it is on and to which dtype

    @classmethod
    def now(cls) -> "TorchState":
        """Returns the current state."""
        kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()]
        return cls(torch.is_grad_enabled(), torch.get_default_dtype(), _precision(), tuple(kinds))

    def restore(self) -> None:
        """Restores this state."""
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
    """Returns the float32 precision: old setting, CUDA setting, and mkldnn setting."""
    # new settings follow the old one, but not vice versa; one that is equal to its backend's is "none", and keeps following it
    backends: Any = torch.backends
    cuda, mkldnn = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    cuda = "none" if cuda == backends.cudnn.fp32_precision else cuda  # which is that of all of cuda
    mkldnn = "none" if mkldnn == backends.mkldnn.fp32_precision else mkldnn
    try:
        return torch.get_float32_matmul_precision(), cuda, mkldnn
    except RuntimeError:  # new settings contradict the old one
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "ieee"  # which contradicts none
        old = torch.get_float32_matmul_precision()
        _set_precision(old, cuda, mkldnn)
        return old, cuda, mkldnn


def _set_precision(old: str, cuda: str, mkldnn: str) -> None:
    torch.set_float32_matmul_precision(old)  # which sets the others, too
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = cuda, mkldnn


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes other threads that save or load wait, because torch's default dtype is shared."""
    with LOADING:
        yield


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Creates tensors on the CPU within the context unless a device is named."""
    try:
        default = torch.get_default_device().type
    except (AssertionError, RuntimeError):  # the device is not there
        default = ""
    with nullcontext() if default == "cpu" else torch.device("cpu"):  # the context costs some time in each operation
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes matrix products in full precision within the context."""
    before = TorchState.now()
    TorchState().restore()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def evaluating_without_grad(model: nn.Module) -> Iterator[None]:
    """Evaluates without gradients, KV cache, or compiled code within the context."""
    with evaluating(model), torch.no_grad():
        yield


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restores the modes of modules and their Hub kernels afterward."""
    modes = {module: module.training for module in model.modules()}
    kernels = {module: mode for module in modes if (mode := _kernels_of(module)) is not None}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for kernelized, mode in kernels.items():
            kernelized.kernels_mode = mode  # type: ignore[assignment]  # chooses kernels again where the mode has changed


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Uses torch in place of Hub kernels within the context.

    Modes and kernels are restored afterward. From 5.25, transformers replaces forwards of norms, activations, and more by kernels
    for the device. Some have no gradients, and they do not compute on the meta device.
    """
    with restored_modes(model):
        for module in model.modules():
            if _kernels_of(module) is not None:
                module.reset_kernels()  # type: ignore[operator]
        yield


def _kernels_of(module: nn.Module) -> object:
    """Returns the mode for which transformers has chosen kernels in a model, if it has."""
    return getattr(module, "kernels_mode", None) if isinstance(module, PreTrainedModel) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluates without dropout, KV cache, Hub kernels, or compiled code within the context.

    Modes, random state, and configs are restored afterwards.
    """
    caching, problems = dict[int, Any](), {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            caching[id(config)] = config
        if isinstance(config, PretrainedConfig) and PROBLEM in vars(config):
            problems[id(config)] = vars(config), vars(config)[PROBLEM]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        for config in caching.values():
            config.use_cache = False
        # eager: compiled code would ignore replaced forwards and new hooks
        with (
            without_kernels(model),
            fresh_autocast_cache(),
            torch.random.fork_rng(devices, device_type=kind),
            torch.compiler.set_stance("force_eager"),
        ):
            model.train()  # some modules discard values computed from parameters, such as LeViT its position biases
            model.eval()
            yield
    finally:
        for config in caching.values():
            config.use_cache = True
        for fields, problem in problems.values():
            fields[PROBLEM] = problem
