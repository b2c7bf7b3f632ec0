"""Removes FSDP2 (`torch.distributed.fsdp.fully_shard`) from modules, and restores it.

Torch has no public way to do this. The private names of FSDP2 and of sharded checkpoints are used in this file alone, and checked
by `check_known` and `metadata_classes`.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from billhook.engine.trees import parameter_slots
from billhook.versions import supported_versions

MODULE = "torch.distributed._composable_state"  # module with torch's `_module_state_mapping`, from modules to their FSDP state
STATE_KEY = "__composable_api_state_key"  # prefix of the attributes in which a module records composable APIs
OF_PART = ("_get_fsdp_state",)
OF_STATE = (
    "_modules", "_mp_policy", "_auto_reshard_after_forward", "_pre_forward_hook_handle", "_post_forward_hook_handle",
    "_states_to_forward_prefetch", "_states_to_backward_prefetch",
)  # fmt: skip
SETTINGS = (
    "reduce_grads", "all_reduce_grads", "reshard_after_backward", "unshard_in_backward", "unshard_async_op",
    "gradient_divide_factor", "force_sum_reduction_for_comms", "_all_reduce_hook", "_all_reduce_hook_stream", "_all_gather_comm",
    "_reduce_scatter_comm",
)  # fmt: skip
"""Settings of a parameter group, from the `set_...` methods of `FSDPModule`."""
NEWER_SETTINGS = ("reduce_scatter_unused_params", "reduce_scatter_max_input_buffers")
"""Settings that torch 2.13 has and 2.10 lacks."""
OF_GROUP = (
    "mesh_info", "post_forward_mesh_info", "offload_policy", "_module_to_pre_save_state_dict_hook_handle",
    "_module_to_pre_load_state_dict_hook_handle", "fsdp_params", *SETTINGS,
)  # fmt: skip
OF_PARAMETER = ("_post_load_hook_handle", "reset_sharded_param")
OF_RUNS = (*OF_PART, STATE_KEY, "_mp_policy")
"""Names needed for forward runs of a sharded model whose shapes stay, such as for masks."""
WRAPPED = "_checkpoint_wrapped_module"  # attribute of torch's activation-checkpointing wrappers, which is part of weight names
OF_LISTS = {"torch.distributed.checkpoint.filesystem": "_StorageInfo", "torch.serialization": "_get_layout"}
"""Private classes in the metadata of a sharded checkpoint, by module."""


@dataclass(frozen=True, eq=False)
class Sharding:
    """How modules are sharded together: arguments of `fully_shard` and later settings."""

    modules: tuple[nn.Module, ...]
    arguments: dict[str, Any]
    settings: dict[str, Any]
    prefetched: tuple[list[nn.Module], list[nn.Module]]  # in the forward and backward pass


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module, also of an FSDP module."""
    kind = type(module)
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)] if isinstance(module, FSDPModule) else kind  # 2.10: always 2


def fsdp_parts(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns the modules that FSDP shards."""
    return [module for module in modules if isinstance(module, FSDPModule)]


def precision_of(part: nn.Module) -> torch.dtype | None:
    """Returns the compute dtype of a sharded module. None for the parameter dtype."""
    dtype: torch.dtype | None = _state(part)._mp_policy.param_dtype
    return dtype


def strip_fsdp(part: nn.Module) -> tuple[type[nn.Module], dict[Any, Any]]:
    """Restores the class of a sharded module; returns the FSDP class and its state."""
    # torch's state on the module has keys that are not plain strings, or begin with STATE_KEY
    kind = type(part)
    kept = {key: value for key, value in vars(part).items() if type(key) is not str or key.startswith(STATE_KEY)}
    part.__class__ = class_of(part)  # fully_shard has replaced the class, and nothing else restores it
    for key in kept:
        del vars(part)[key]
    return kind, kept


def remove_fsdp(module: nn.Module) -> list[Sharding]:
    """Removes FSDP from a module, whose parameters stay shards; returns the shardings.

    Raises:
        RuntimeError: If this torch has an unknown FSDP2. Nothing has changed then.
        ValueError: If parameters of a module are sharded over several meshes.
    """
    parts = fsdp_parts(module.modules())
    for part in parts:
        check_known(part)
    states = list(dict.fromkeys(map(_state, reversed(parts))))
    shardings = list(map(_sharding, states))
    for state in states:
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in groups_of(state):
            for hooks in (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle):
                for hook in hooks.values():
                    hook.remove()
            for parameter in group.fsdp_params:
                parameter._post_load_hook_handle.remove()
    for part in parts:
        for key, marks in strip_fsdp(part)[1].items():
            if type(key) is str:
                # torch does not shard a module with this mark again; other marks may be there too
                for mark in (inspect.unwrap(fully_shard), fully_shard.__name__):
                    marks.pop(mark, None)
                vars(part)[key] = marks
        _states_of_modules().pop(part, None)
    return shardings


def restore_fsdp(module: nn.Module, shardings: list[Sharding], shards: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Shards a module as before, without modules that it has lost.

    Args:
        module: The module with full parameters, whose values are not used.
        shardings: The result of `remove_fsdp`.
        shards: The shard of each full parameter. Other parameters stay full.
    """
    slots, parts = list(parameter_slots(module)), set(module.modules())
    ignored = set(module.parameters()).difference(shards)
    sizes = {}
    dimensions = dict[nn.Parameter, Shard | None]()  # sharded dimension by parameter; None for the first
    for full, shard in shards.items():
        # `fully_shard` divides meta parameters, which needs no memory or communication; shards replace them below
        sizes[full] = size = nn.Parameter(torch.empty_like(full, device="meta"), full.requires_grad)
        dimensions[size] = None
        for placement in getattr(shard, "placements", ()):
            if isinstance(placement, Shard) and placement.dim:
                dimensions[size] = placement
                break
    for (part, name), full in slots:
        part._parameters[name] = sizes.get(full, full)
    meshes = [sharding.arguments["mesh"] for sharding in shardings if "mesh" in sharding.arguments]
    for sharding in shardings:
        modules = [part for part in sharding.modules if part in parts]
        if modules:
            arguments = {"mesh": meshes[0], "ignored_params": ignored, "shard_placement_fn": dimensions.get} | sharding.arguments
            fully_shard(modules if len(modules) > 1 else modules[0], **arguments)
            for group in groups_of(_state(modules[0])):
                vars(group).update(sharding.settings)
    for sharding in shardings:
        forward, backward = map(fsdp_parts, sharding.prefetched)
        for part in fsdp_parts(sharding.modules):
            part.set_modules_to_forward_prefetch(forward)
            part.set_modules_to_backward_prefetch(backward)
    for (part, name), full in slots:
        part._parameters[name] = shards.get(full, full)
    for part in fsdp_parts(module.modules()):
        for group in groups_of(_state(part)):
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()  # registers the new tensor of the shard


def _state(part: Any) -> Any:  # noqa: ANN401
    return part._get_fsdp_state()


def groups_of(state: Any) -> list[Any]:  # noqa: ANN401
    """Returns the parameter groups of a sharded module, of which torch 2.10 has a single."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


def _sharding(state: Any) -> Sharding:  # noqa: ANN401
    if len(groups_of(state)) > 1:
        raise ValueError(
            f"model: parameters of {class_of(state._modules[0]).__name__} are sharded over several meshes, which cannot be "
            "restored after shapes change. Shard them over a single mesh."
        )
    arguments = {"mp_policy": state._mp_policy}
    settings = {}
    for group in groups_of(state):
        after = group.post_forward_mesh_info
        reshard: bool | int | None = after is not None
        if state._auto_reshard_after_forward:
            reshard = None
        elif after is not None and after.mesh is not group.mesh_info.mesh:
            reshard = after.shard_mesh_size
        arguments |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy, "reshard_after_forward": reshard}
        settings = {name: getattr(group, name) for name in (*SETTINGS, *NEWER_SETTINGS) if hasattr(group, name)}
    prefetched = _modules_of(state._states_to_forward_prefetch), _modules_of(state._states_to_backward_prefetch)
    return Sharding(state._modules, arguments, settings, prefetched)


def _modules_of(states: Iterable[Any]) -> list[nn.Module]:
    return [part for state in states for part in state._modules]


def check_known(part: Any, reshapes: bool = True) -> None:  # noqa: ANN401
    """Raises if this FSDP2 lacks a private name that is needed, before anything changes.

    Args:
        part: A sharded module.
        reshapes: Whether FSDP is removed and restored, which needs more names than forward runs.
    """
    missing = _lacking(part, OF_PART)
    if not missing:
        state = _state(part)
        missing += _lacking(state, OF_STATE if hasattr(state, "_fsdp_param_group") else (*OF_STATE, "_fsdp_param_groups"))
        for group in groups_of(state):
            missing += _lacking(group, OF_GROUP)
            for parameter in getattr(group, "fsdp_params", ()):
                missing += _lacking(parameter, OF_PARAMETER)
    if not any(type(key) is str and key.startswith(STATE_KEY) for key in vars(part)):
        missing.append(STATE_KEY)
    if not hasattr(_states_of_modules(), "pop"):
        missing.append(f"{MODULE}._module_state_mapping")
    _refuse(
        [name for name in missing if reshapes or name in OF_RUNS],
        "its FSDP2",
        "work on a sharded model",
        ", or run this step on a single device first",
    )


def _lacking(owner: Any, names: Iterable[str]) -> list[str]:  # noqa: ANN401
    return [name for name in names if not hasattr(owner, name)]


def metadata_classes() -> dict[str, dict[str, Any]]:
    """Returns the classes in `OF_LISTS`. Raises if this torch lacks them."""
    classes = {module: {name: vars(import_module(module)).get(name)} for module, name in OF_LISTS.items()}
    missing = [f"{module}.{name}" for module, name in OF_LISTS.items() if classes[module][name] is None]
    _refuse(missing, "it", "read a sharded checkpoint")
    return classes


def wrapper_tensor(kind: type[Tensor], size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """Creates a tensor of a subclass that has a size and no memory.

    Args:
        kind: The subclass.
        size: The size.
        dtype: The dtype.
        device: The device that it seems to be on.
    """
    return kind._make_wrapper_subclass(kind, size, dtype=dtype, device=device)


def as_plain() -> AbstractContextManager[None]:
    """Disables `__torch_function__` of tensor subclasses within the context."""
    return torch._C.DisableTorchFunctionSubclass()


def _refuse(missing: Iterable[str], what: str, why: str, instead: str = "") -> None:
    if named := ", ".join(dict.fromkeys(missing)):
        needed = f"torch {torch.__version__}: {what} lacks {named}, which billhook needs to {why}"
        raise RuntimeError(f"{needed}. Install {supported_versions('torch')}{instead}.")


def _states_of_modules() -> Any:  # noqa: ANN401
    try:
        return vars(import_module(MODULE)).get("_module_state_mapping")
    except ImportError:
        return None
