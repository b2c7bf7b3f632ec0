"""Sharded parameters: layouts, gathered tensors, and modules without FSDP hooks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from typing_extensions import Self

from billhook.engine.fsdp import check_known, fsdp_parts, precision_of, strip_fsdp
from billhook.engine.trees import parameter_slots


def unallocated(shard: DTensor) -> nn.Parameter:
    """Returns a full parameter for a shard, without memory. It must not be read."""
    return nn.Parameter(_empty(shard, torch.device(shard.device_mesh.device_type)), shard.requires_grad)


def free(parameter: nn.Parameter) -> None:
    """Frees the memory of a full parameter. Autograd keeps the tensor for later."""
    storage = parameter.untyped_storage()
    if storage.resizable():
        storage.resize_(0)
    else:  # shared with another owner, such as an array
        parameter.data = _empty(parameter, parameter.device)


def _empty(like: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty(like.shape, dtype=like.dtype, device=device)
    empty.untyped_storage().resize_(0)  # as FSDP does: the tensor keeps its size, and what autograd has saved of it is the same
    return empty


def has_memory(parameter: nn.Parameter) -> bool:
    """Tells whether the values of a parameter are there."""
    return bool(parameter.untyped_storage().size() > 0)


def is_sharded(module: nn.Module) -> bool:
    """Tells whether parameters of a module are shards, or were before a forward gathered them."""
    return bool(fsdp_parts(module.modules())) or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def is_tensor_parallel(module: nn.Module) -> bool:
    """Tells whether parameters are split by tensor parallelism, also together with FSDP2."""
    by_fsdp = bool(fsdp_parts(module.modules()))  # which shards one mesh dimension
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            split = [placement for placement in parameter.placements if not placement.is_replicate()]
            if len(split) > 1 or (not by_fsdp and any(isinstance(placement, Shard) and placement.dim for placement in split)):
                return True
    return False


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shards a model over a mesh: each block, and the remaining modules together."""
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def reshard(module: nn.Module) -> None:
    """Reshards parameters that a forward left gathered, as changes to them would be lost."""
    for part in fsdp_parts(module.modules()):
        part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a full tensor without gradient, gathered from shards if needed."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    on_device: Any = tensor.detach().to(tensor.device_mesh.device_type)  # weights may be on the CPU
    full: Tensor = on_device.full_tensor()
    return full


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard, sharing memory. Other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards and places a tensor like another of its size."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(like.device)
    # without a source rank nothing is sent: each rank takes its part of its own tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


@dataclass(frozen=True)
class Layout:
    """The layout of a sharded parameter: mesh, placements, and device."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    device: torch.device

    @classmethod
    def of(cls, shard: DTensor) -> Self:
        """Returns the layout of a shard."""
        return cls(shard.device_mesh, shard.placements, shard.device)

    def shards(self, parameter: nn.Parameter, first: bool = False) -> nn.Parameter:
        """Shards a full parameter and its gradient.

        The dimension is the first if the layout's dimension does not exist or is not evenly divisible.

        Args:
            parameter: The parameter.
            first: Whether the first rank's values are sent to all. Otherwise all ranks have the same.
        """
        uneven = any(
            isinstance(placement, Shard) and (placement.dim >= parameter.ndim or parameter.shape[placement.dim] % size)
            for placement, size in zip(self.placements, self.mesh.shape, strict=True)
        )
        placed = [Shard(0) if uneven and isinstance(placement, Shard) else placement for placement in self.placements]
        divide = partial(distribute_tensor, device_mesh=self.mesh, placements=placed, src_data_rank=0 if first else None)
        shard = nn.Parameter(divide(parameter.detach()).to(self.device), parameter.requires_grad)
        if parameter.grad is not None:
            shard.grad = divide(parameter.grad).to(self.device)
        return shard


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Removes FSDP from a module within the context, except for its shards.

    Forwards gather nothing, as ranks may run different numbers of them. Autocast replaces FSDP's compute dtype.

    Raises:
        RuntimeError: If this torch has an unknown FSDP2. Nothing has changed then.
    """
    reshard(module)
    parts = fsdp_parts(module.modules())
    for part in parts:
        check_known(part, reshapes=False)
    dtype = next(filter(None, map(precision_of, parts)), None)
    device = next((shard.device_mesh.device_type for shard in module.parameters() if isinstance(shard, DTensor)), "cpu")
    kept = {part: strip_fsdp(part) for part in parts}
    try:
        # no cache: gathered parameters reuse memory, so a cached cast could belong to another one
        with _unhooked(module), nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=False):
            yield
    finally:
        for part, (kind, states) in kept.items():
            part.__class__ = kind
            vars(part).update(states)


@contextmanager
def _unhooked(module: nn.Module) -> Iterator[None]:
    """Removes FSDP's forward hooks within the context. Other hooks may change."""
    fsdp, kept = FSDPModule.__module__, []
    for part in module.modules():
        for store in (part._forward_pre_hooks, part._forward_hooks):
            taken = {number for number, hook in store.items() if str(getattr(hook, "__module__", "")).startswith(fsdp)}
            kept.append((store, dict(store), taken))
            for number in taken:
                del store[number]
    try:
        yield
    finally:
        for store, before, taken in kept:
            # hooks run in dictionary order: FSDP's return to their old positions, before new hooks
            now = {number: hook for number, hook in before.items() if number in store or number in taken} | dict(store)
            store.clear()
            store.update(now)


@contextmanager
def sizes_only(module: nn.Module) -> Iterator[None]:
    """Puts a sharded module on the meta device, except buffers. Tied weights stay tied."""
    with unsharded(module):
        sharded = [(slot, shard) for slot, shard in parameter_slots(module) if isinstance(shard, DTensor)]
        on_meta = {}
        try:
            for (part, name), shard in sharded:
                if shard not in on_meta:
                    empty = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
                    on_meta[shard] = nn.Parameter(empty, shard.requires_grad)
                part._parameters[name] = on_meta[shard]
            yield
        finally:
            for (part, name), shard in sharded:
                part._parameters[name] = shard
