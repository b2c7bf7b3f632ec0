"""Models without weights: from a config or name, and meta copies."""

import copy
import dis
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from billhook.assets import model_path
from billhook.engine import is_sharded, sizes_only, without_kernels
from billhook.model.config_fields import build_or_refuse, named_class
from billhook.model.shape import KEY
from billhook.model.shaped import apply_entry

Module = TypeVar("Module", bound=nn.Module)
MAPPINGS = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in
            ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "CTC")]  # fmt: skip
MAPPINGS.append("MODEL_MAPPING_NAMES")
KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation", "experts_implementation_internal")
BLOCKS = ("layer", "layers", "depth", "depths", "blocks")
EXPERTS = ("experts",)
"""How fields of configs end that choose kernels, and that say how often something is built."""
MOST = 10_000
PARTS = ("torch.nn.utils.", "transformers.")
"""Where hooks are defined that are called in a meta copy: weight masks and norms; transformers' output recorders."""


def to_meta(model: Module) -> Module:
    """Copies a module to the meta device in eval mode, without values."""
    if is_sharded(model):
        with without_kernels(model), sizes_only(model):
            return to_meta(model)
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for module in model.modules():  # tensors that hooks or code have computed from parameters
        memo |= {id(t): t.detach().clone() for t in vars(module).values() if isinstance(t, Tensor) and t.grad_fn is not None}
        for kind, hooks in vars(module).items():
            if not kind.endswith("_hooks") or not isinstance(hooks, dict):
                continue
            memo[id(hooks)] = new = type(hooks)()
            before = kind == "_forward_pre_hooks"
            for key, hook in hooks.items() if before or kind == "_forward_hooks" else ():
                if not getattr(hook, "keeps_shapes", False):
                    new[key] = hook if _function(hook).__module__.startswith(PARTS) else HookStandIn(hook, module, before)
    with without_kernels(model):
        return _copied(model, memo)


def _copied(model: Module, memo: dict[int, Any]) -> Module:
    """Copies a module in eval mode, with replacements for some parts by id."""
    try:
        copied = copy.deepcopy(model, dict(memo))  # which writes to its memo
    except (TypeError, ValueError, RuntimeError):
        shared = {}  # attributes that cannot be copied, such as locks and files
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    try:
                        copy.deepcopy(value, dict(memo))
                    except Exception:  # whatever a class of somebody's own raises
                        shared[id(value)] = value
        copied = copy.deepcopy(model, memo | shared)
    return copied.train(False)


class HookStandIn:
    """Replaces a hook in a meta copy. The hook is not called, as it may have side effects."""

    def __init__(self, hook: Callable[..., Any], module: nn.Module, before: bool) -> None:
        self.harmless = returns_none(hook)
        self.before = before
        self.note: Callable[[object], None] | None = None  # receives the values that the hook could have replaced
        does = "it returns nothing, so it should change nothing" if self.harmless else "what it returns would count; remove it"
        moment = "before" if before else "after"
        self.says = (
            f"the hook {_function(hook).__qualname__} {moment} the forward of {type(module).__name__} is not called: {does}"
        )

    def __call__(self, module: nn.Module, *args: Any) -> None:  # noqa: ANN401 - what hooks get
        """Reports values that the hook could have replaced."""
        if self.note is not None and not self.harmless:
            self.note(args if self.before else args[-1])


def stand_ins_in(meta_model: nn.Module) -> list[HookStandIn]:
    """Returns the hook stand-ins in a meta copy."""
    hooks = (hook for m in meta_model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return [hook for hook in hooks if isinstance(hook, HookStandIn)]


def returns_none(hook: Callable[..., Any]) -> bool:
    """Returns whether a hook's code only returns None, so that nothing is replaced."""
    code = getattr(_function(hook), "__code__", None)
    if code is None:
        return False
    for before, step in pairwise(dis.get_instructions(code)):
        if step.opname == "RETURN_CONST" and step.argval is not None:  # of Python 3.12 and 3.13
            return False
        if step.opname == "RETURN_VALUE" and (before.opname != "LOAD_CONST" or before.argval is not None):
            return False
    return True


def _function(hook: Callable[..., Any]) -> Any:  # noqa: ANN401 - a function, or a class that is called
    """Returns the code of a hook, without partials, decorators, or binding."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = inspect.unwrap(hook)
    if inspect.isroutine(hook):
        return getattr(hook, "__func__", hook)
    return type(hook).__call__


def check_checkpoint(name: str) -> None:
    """Raises for a path that is not a Hugging Face checkpoint. Hub names pass."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder '{name}' has no config.json, so it is not a Hugging Face checkpoint")
    if path.is_file() or (not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1)):
        raise ValueError(f"'{name}' is not a folder with a Hugging Face checkpoint")


def _check_on_hub(name: str) -> None:
    """Raises if a model is neither local nor on the Hub, with a single request."""
    no_folder = f"there is no folder '{name}' here, and"
    legal = 'name a folder, a model of the Hub, or "tiny"'
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{no_folder} no model of that name has been downloaded from the Hub; HF_HUB_OFFLINE is set: {legal}"
            )
        on_hub = HfApi().file_exists(name, "config.json")
    except HFValidationError:
        raise ValueError(f"{no_folder} no model of the Hub can have such a name: {legal}") from None
    except HfHubHTTPError:  # the Hub has answered, and transformers says what: a model is gated, or the Hub is out of order
        return
    except ValueError:
        raise
    except Exception as error:  # the client and what it is made of raise all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{no_folder} the Hub cannot be asked for a model of that name ({first}): {legal}") from error
    if not on_hub:
        raise ValueError(f"{no_folder} the Hub has no model of that name, or hides it from who is not logged in: {legal}")


def model_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """Returns the class that a config names. Raises if it is unknown or does not match."""
    names = config.architectures or []
    first = names[0] if isinstance(names, list) and names else None
    kind = named_class(first)
    if kind is None:
        raise ValueError(f"the config of '{name}' names the class {names or None}, which transformers does not have")
    mappings = (mapping for mapping in dir(modeling_auto) if mapping.endswith("MAPPING_NAMES"))
    if not isinstance(config, kind.config_class or ()) and not any(first in _named(mapping, config) for mapping in mappings):
        raise ValueError(f"the config of '{name}' is a {type(config).__name__}, from which no {kind.__name__} is built")
    return kind


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    """Builds a meta model of the class that a config names, or of its family."""
    config = copy.deepcopy(config)
    stated = config.architectures
    names = [*(stated if isinstance(stated, list) else ()), *(name for mapping in MAPPINGS for name in _named(mapping, config))]
    kind = next(filter(None, map(named_class, names)), None)
    if kind is None:
        raise ValueError(f"transformers has no model class for the config of type '{config.model_type}' ({config.architectures})")
    model = build_or_refuse(kind, config)
    if isinstance(config.dtype, torch.dtype):
        nn.Module.to(model, dtype=config.dtype)
    model.train(False)
    return model


def from_name(name: str | os.PathLike[str]) -> PreTrainedModel:
    """Builds a meta model from a folder, config.json, Hub name, or "tiny", without weights.

    It has the shape in the config's `"billhook"` entry, if there is one.
    """
    name = model_path(os.fspath(name))
    config = read_config(name)
    entry = vars(config).pop(KEY, None)
    model = from_config(config)
    if entry is not None:
        apply_entry(model, entry, name)
    return model


def read_config(name: str) -> PretrainedConfig:
    """Reads the config of a folder, config.json, or Hub name, without running its code.

    Raises for an unknown family, custom code, or an implausible number of blocks.
    """
    if not Path(name).is_file():
        check_checkpoint(name)
    if not Path(name).exists():
        _check_on_hub(name)
    try:
        file = Path(name).is_file()
        plain = json.loads(Path(name).read_text()) if file else PretrainedConfig.get_config_dict(name)[0]
        if refusal := _refusal(plain):
            config = None
        elif file:
            config = transformers.CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        else:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds
        first = (str(error).strip().splitlines() or [""])[0]
        unread = isinstance(error, OSError)
        what = "has no config that can be read" if unread else "is not a config of a family that transformers knows"
        if unread and not Path(name).exists():
            raise ValueError(f"there is no folder '{name}' here, and no model of that name came from the Hub: {first}") from error
        raise ValueError(f"'{name}' {what}: {type(error).__name__}: {first}") from error
    if config is None:
        raise ValueError(f"'{name}' {refusal}")
    return config


def _refusal(plain: object) -> str | None:
    """Returns the problem of a raw config, before it is instantiated."""
    fields = list(_fields_in(plain))
    for key, value in fields:
        if key.endswith(KERNELS) and isinstance(value, str) and "/" in value:
            return f"asks for the kernel {value[:80]!r}, which is code from a hub; billhook does not run it"
    blocks, experts = (
        max((n for key, n in fields if key.endswith(kind) and type(n) is int), default=1) for kind in (BLOCKS, EXPERTS)
    )
    if max(blocks, experts) > MOST or blocks * max(experts, 1) > 100 * MOST:
        return f"asks for {blocks} blocks and {experts} experts, more than any model has"
    return None


def _fields_in(plain: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all values of a config by field name, also nested values."""
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            yield from _fields_in(value, key if key.endswith(KERNELS) else str(name))  # a kernel for each part
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from _fields_in(value, key)
    else:
        yield key, plain


def _named(mapping: str, config: PretrainedConfig) -> tuple[str, ...]:
    names: str | tuple[str, ...] = getattr(modeling_auto, mapping).get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)
