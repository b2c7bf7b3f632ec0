"""Private names of transformers' loader, for conversions between files and models."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from billhook.linalg import TensorDict, TensorsByName
from billhook.versions import version_hint

LOADED = "_is_hf_initialized"  # attribute of loaded modules and tensors, which are not initialized
LOADER = "to save models and to stream them"
"""The purpose of the loader's names, for errors. They are imported on use, as they move often."""


def _conversions(model: PreTrainedModel) -> Any:  # noqa: ANN401 - a list of what differs by release
    with version_hint("transformers", LOADER):
        from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def is_joined_unevenly(model: PreTrainedModel) -> bool:
    """Returns whether files join tensors of unequal sizes, which loading would split wrongly."""
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import Chunk

    state = model.state_dict(keep_vars=True)
    for conversion in getattr(model, "_weight_conversions", None) or _conversions(model):
        if not any(isinstance(operation, Chunk) for operation in getattr(conversion, "operations", ())):
            continue
        shapes = defaultdict(set)  # shapes of joined tensors, by the common part of their names
        for name, tensor in state.items():
            for part in conversion.target_patterns:
                if part in name:
                    shapes[name.replace(part, "")].add(tensor.shape)
        if any(len(joined) > 1 for joined in shapes.values()):
            return True
    return False


def initialize_buffers(model: PreTrainedModel, names_in_files: Iterable[str]) -> None:
    """Initializes buffers of a meta model on the CPU, and parameters that files may lack."""
    parameters = dict(model.named_parameters())
    made = set(parameters.values()).difference(map(parameters.get, names_in_files))
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]  # which the class creates
    for name, parameter in parameters.items():
        if not any(pattern.search(name) for pattern in patterns):
            made.discard(parameter)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, slot in module._parameters.items():
            if slot is not None and slot in made:
                module._parameters[name] = nn.Parameter(torch.empty_like(slot, device="cpu"), slot.requires_grad)
            elif slot is not None:
                setattr(slot, LOADED, True)  # otherwise it would get random values
        setattr(module, LOADED, False)  # a module may initialize buffers of its submodules
    model.initialize_weights()  # type: ignore[no-untyped-call]


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Maps tensor names in checkpoint files to names in a model, without unknown names.

    A tensor that becomes several, or a part of another, maps to the first name.
    """
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, state = _conversions(model), model.state_dict()
    renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in mapping if isinstance(conversion, WeightConverter)]
    parameters = {}
    for key in keys:
        for conversions in ((renamings, converters), ([], [])):  # files may already have the model's names
            name, _ = rename_source_key(key, *conversions, model.base_model_prefix, state)
            if name in state:
                parameters[key] = name
                break
    return parameters


def load_tensors(model: PreTrainedModel, slices: Mapping[str, Any]) -> None:
    """Loads slices of checkpoint files into a model, in the model's dtypes."""
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as load_state
        from transformers.modeling_utils import LoadStateDictConfig

    conversions = getattr(model, "_weight_conversions", None)
    dtype = model.dtype
    plan = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=_conversions(model))
    try:
        with progress_bars_off():
            load_state(model, dict(slices), plan)
    finally:
        vars(model)["_weight_conversions"] = conversions  # saving reverts the conversions of all tensors


@contextmanager
def progress_bars_off() -> Iterator[None]:
    """Disables transformers' progress bars within the context."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def to_file_format(model: PreTrainedModel, state: TensorsByName) -> TensorDict:
    """Converts model tensors to the names and layout of checkpoint files."""
    if is_joined_unevenly(model):
        return dict(state)
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import revert_weight_conversion

    tensors: TensorDict = revert_weight_conversion(model, dict(state))
    return tensors


def save_state(model: PreTrainedModel, folder: Path, state: TensorsByName | None = None, **options: Any) -> None:  # noqa: ANN401
    """Saves config and weights, including weights that the class would recreate."""
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = None  # recreated weights may have been pruned, so they are saved too
    try:
        model.save_pretrained(
            folder,
            state_dict=None if state is None else dict(state),
            save_original_format=not is_joined_unevenly(model),
            **options,
        )
    finally:
        model._keys_to_ignore_on_save = ignored
