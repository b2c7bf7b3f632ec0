"""Private names of transformers, whose existence a test checks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from billhook.engine import LOADED, overridden
from billhook.model.config_fields import configs_of

ATTENTION = "_attn_implementation_internal"  # config attribute for the attention implementation, without validation
EXPERTS = "_experts_implementation_internal"  # config attribute for the experts implementation
_ATTENTION_FUNCTIONS_LOCK = RLock()  # they belong to the process; a thread that restores them would remove another's wrapper


def attention_of(config: PretrainedConfig) -> str | None:
    """Returns the attention implementation. None if it is not set yet."""
    implementation: str | None = getattr(config, ATTENTION, None)
    return implementation


def set_attention(config: PretrainedConfig, implementation: str) -> None:
    """Sets the attention implementation, also to custom ones."""
    config._attn_implementation = implementation


@contextmanager
def attention_for_all_dtypes(model: nn.Module) -> Iterator[None]:
    """Uses sdpa in place of kernels that support only some dtypes, such as flash attention."""
    with ExitStack() as stack:
        for config in configs_of(model):
            if attention_of(config) not in (None, "eager", "sdpa"):
                stack.enter_context(overridden(config, **{ATTENTION: "sdpa"}))
        yield


@contextmanager
def attention_functions_as(wrapper: Callable[..., Any]) -> Iterator[None]:
    """Calls the wrapper with the attention function and its arguments; threads take turns."""
    with _ATTENTION_FUNCTIONS_LOCK:
        function_of = ALL_ATTENTION_FUNCTIONS.get_interface
        with overridden(ALL_ATTENTION_FUNCTIONS, get_interface=lambda *names: partial(wrapper, function_of(*names))):
            yield


def has_sdpa(kind: type[nn.Module]) -> bool:
    """Returns whether a model class supports `scaled_dot_product_attention`."""
    return bool(getattr(kind, "_supports_sdpa", False))


def compute_every_expert(model: nn.Module) -> None:
    """Uses the experts implementation that does not depend on token counts."""
    for config in configs_of(model):
        config._experts_implementation = "batched_mm"


def compute_experts_eagerly(model: nn.Module) -> None:
    """Uses the experts implementation of the class's own code."""
    for config in configs_of(model):
        config._experts_implementation = "eager"


def follows_inputs(module: nn.Module, buffer: str) -> bool:
    """Returns whether forwards change a buffer, such as dynamic rotary frequencies."""
    types = getattr(module, "rope_type", None)
    names = map(str, types.values() if isinstance(types, dict) else [types])  # one for each kind of layers
    changes = any("dynamic" in name or name == "longrope" for name in names)
    return changes and buffer.endswith("inv_freq") and "original" not in buffer


def match_implementations(model: nn.Module, other: nn.Module) -> None:
    """Copies attention and experts implementations between the modules of two models."""
    parts = dict(model.named_modules())
    for name, module in other.named_modules():
        config, stated = (vars(part).get("config") for part in (module, parts.get(name, module)))
        if isinstance(config, PretrainedConfig) and isinstance(stated, PretrainedConfig):
            vars(config).update({key: vars(stated)[key] for key in (ATTENTION, EXPERTS) if key in vars(stated)})


def build_class(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model with weights. Buffers are initialized in float32 as on loading."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for module in model.modules():
        setattr(module, LOADED, not module._buffers)
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return model


def classes_of(auto: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:  # noqa: ANN401 - an auto class
    """Returns the model classes that an auto class may use for a config."""
    classes = auto._model_mapping.get(type(config), ())
    return list(classes) if isinstance(classes, tuple | list) else [classes]
