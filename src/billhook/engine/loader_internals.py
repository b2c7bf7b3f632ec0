"""Private names of transformers' loader, by which tensors of files become a model's, and a model's those of files."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from billhook.versions import version_hint

LOADED = "_is_hf_initialized"
"""The attribute of modules and tensors that are not to be initialized, as they are loaded."""


LOADER = "to save models and to stream them"
"""What the names of transformers' loader are for, which are imported where something asks for them: they move often."""


def _conversions(model: PreTrainedModel) -> Any:  # noqa: ANN401 - a list of what differs by release
    """Returns how the tensors of a family's files become those of a model."""
    with version_hint("transformers", LOADER):
        from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def is_joined_unevenly(model: PreTrainedModel) -> bool:
    """Finds whether files of a family join tensors, such as queries and keys, that loading would wrongly cut in equal parts."""
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import Chunk

    conversions = getattr(model, "_weight_conversions", None) or _conversions(model)
    state = model.state_dict(keep_vars=True)
    for conversion in conversions:
        if not any(isinstance(operation, Chunk) for operation in getattr(conversion, "operations", ())):
            continue
        shapes = defaultdict[str, set[torch.Size]](set)  # of the tensors that are joined, by what their names have in common
        for name, tensor in state.items():
            for part in conversion.target_patterns:
                if part in name:
                    shapes[name.replace(part, "")].add(tensor.shape)
        if any(len(joined) > 1 for joined in shapes.values()):
            return True
    return False


def made_by_class(model: PreTrainedModel, read: Iterable[str]) -> set[str]:
    """Names the parameters that files may lack, as the class makes them, such as sinusoidal positions; none that is `read`."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    parameters = dict(model.named_parameters())
    in_files = {parameters[name] for name in read if name in parameters}
    missing = [name for name, parameter in parameters.items() if parameter not in in_files]
    return {name for name in missing if any(pattern.search(name) for pattern in patterns)}


def initialize_buffers(model: PreTrainedModel, parameters: Container[str] = ()) -> None:
    """Makes the buffers of a model on meta as its class does, and some parameters, on the CPU; nothing else gets values."""
    made = {parameter for name, parameter in model.named_parameters() if name in parameters}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in made:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            elif parameter is not None:
                setattr(parameter, LOADED, True)  # or random values would be drawn for it
        setattr(module, LOADED, False)  # a module may make the buffers of those within
    model.initialize_weights()  # type: ignore[no-untyped-call]


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Returns what a model calls the tensors of a checkpoint's files: of one that becomes several, or part of one, the first.

    Those that the model does not have are left out.
    """
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, state = _conversions(model), model.state_dict()
    renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in mapping if isinstance(conversion, WeightConverter)]
    parameters = {}
    for key in keys:
        for conversions in ((renamings, converters), ([], [])):  # files may also have the names of the model already
            name, _ = rename_source_key(key, *conversions, model.base_model_prefix, state)
            if name in state:
                parameters[key] = name
                break
    return parameters


def load_tensors(model: PreTrainedModel, slices: Mapping[str, Any]) -> None:
    """Loads some tensors of a checkpoint, given as slices of its files, in the dtypes that the model's own have."""
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as load_state
        from transformers.modeling_utils import LoadStateDictConfig

    conversions = getattr(model, "_weight_conversions", None)
    dtype: torch.dtype = model.dtype
    mapping = _conversions(model)
    plan = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)
    try:
        with progress_bars_off():
            load_state(model, dict(slices), plan)
    finally:
        vars(model)["_weight_conversions"] = conversions  # of all tensors, which saving turns back


@contextmanager
def progress_bars_off() -> Iterator[None]:
    """Has transformers show no bars of its own within."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def to_file_format(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns some of a model's tensors as its files hold them, which may join or name them otherwise."""
    if is_joined_unevenly(model):
        return dict(state)
    with version_hint("transformers", LOADER):
        from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return tensors


def save_state(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None, **options: Any) -> None:  # noqa: ANN401
    """Saves config and weights, or others by their names; also those that the class leaves out because it makes them."""
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = None  # what the class makes anew may be pruned here, and so is saved, too
    try:
        model.save_pretrained(
            folder,
            state_dict=None if state is None else dict(state),
            save_original_format=not is_joined_unevenly(model),
            **options,
        )
    finally:
        model._keys_to_ignore_on_save = ignored
