"""A stand-in for a GPU without float64, as Apple's and Intel's Arc are: its tensors have another device, and compute on the CPU.

torch lets one device be added from Python, once in a process and for good, so whoever uses it does so in a process of its own.
"""

import ctypes
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.dlpack import from_dlpack, to_dlpack

NAME = "standin"
WIDE = (torch.float64, torch.complex128)
MOVING = ("copy_", "_to_copy", "_copy_from")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # by indices of the CPU, too
OTHER = 12  # kDLExtDev, which is torch's PrivateUse1


def is_far(tensor):
    return tensor.device.type == NAME


def far_of(near):
    """A tensor of the device in the memory of one of the CPU: a DLPack of it that names another device."""
    if near.dtype in WIDE:
        raise TypeError(f"{NAME} has no {near.dtype}")
    packed = to_dlpack(near.detach())
    address = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(packed), b"dltensor")
    ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = OTHER
    return from_dlpack(packed)


def near_of(far):
    """The tensor of the CPU in the same memory, which lasts as long."""
    memory = far.untyped_storage()
    if not memory.nbytes():
        return torch.empty_strided(far.shape, far.stride(), dtype=far.dtype)
    held = (ctypes.c_char * memory.nbytes()).from_address(memory.data_ptr())
    held.owner = memory
    return torch.frombuffer(held, dtype=far.dtype).as_strided(far.shape, far.stride(), far.storage_offset())


def computed(op, *args, **kwargs):
    """Computes as the device does: only with its own tensors, and never in float64."""
    name, device, given = op.overloadpacket.__name__, kwargs.get("device"), list[tuple[Tensor, Tensor]]()

    def near(one):
        if is_far(one):
            given.append((one, near_of(one)))
            return given[-1][1]
        if one.ndim and name not in (*MOVING, *INDEXED):
            raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found two, {NAME} and cpu")
        return one

    def far(one):
        same = next((far for far, own in given if own is one), None)
        if same is None:
            return far_of(one)
        if same.shape != one.shape:  # an `out` that was resized
            same.data = far_of(one)
        return same

    tensors = [argument.type.isSubtypeOf(torch._C.TensorType.get()) for argument in op._schema.arguments]
    args = [torch.tensor(one) if tensors[place] and isinstance(one, int | float) else one for place, one in enumerate(args)]
    args, kwargs = tree_map_only(Tensor, near, (args, kwargs))
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    found = op(*args, **kwargs)
    return found if torch.device(device or NAME).type != NAME else tree_map_only(Tensor, far, found)


def copied(source, target, non_blocking=False):
    """Moves numbers between devices."""
    source, target_near = (near_of(one) if is_far(one) else one for one in (source, target))
    target_near.copy_(source)
    return target


class Registered:
    """The device, for as long as the process lasts; `state` is that of its random numbers."""

    def __init__(self):
        get, self.state = ctypes.pythonapi.PyCapsule_GetPointer, torch.zeros(8, dtype=torch.uint8)
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        module = SimpleNamespace(
            is_initialized=lambda: True,
            is_available=lambda: True,
            current_device=lambda: 0,
            device_count=lambda: 1,
            _is_in_bad_fork=lambda: False,
            get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
            manual_seed=lambda seed: self.state.fill_(seed % 256),
            manual_seed_all=lambda seed: self.state.fill_(seed % 256),
            get_rng_state=lambda device=0: self.state.clone(),
            set_rng_state=lambda new, device=0: self.state.copy_(new),
        )
        _setup_privateuseone_for_python_backend(NAME, module)
        self._kept = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        self._kept[0].fallback(computed, "PrivateUse1")
        self._kept[1].impl("_copy_from", copied, "PrivateUse1")
