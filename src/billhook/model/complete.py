"""Checks that checkpoints contain all tensors of a model, except for a new task head."""

import copy
import json
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from billhook.model.config_fields import build_or_refuse, named_class
from billhook.model.layers import NEW

ModelLoader = Any  # a model class or an auto class, with `from_pretrained`


@dataclass(frozen=True)
class Gaps:
    """Tensors that checkpoint files lack, and tensors of other sizes than in the model."""

    missing: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def check_shards(name: str) -> None:
    """Raises if a folder lacks a file of its index. Hub names pass."""
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    read = next(filter(Path.is_file, map(Path(name).joinpath, files)), None)
    if read is None or read.suffix != ".json":
        return
    try:
        named = set(map(str, json.loads(read.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):  # reported when it is read
        return
    if outside := sorted(file for file in named if Path(file).is_absolute() or ".." in Path(file).parts):
        raise ValueError(f"'{name}': {outside[0]}, which {read.name} names, is outside of the folder, so it cannot be loaded")
    if absent := sorted(file for file in named if not Path(name, file).is_file()):
        more = f", nor are {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(f"'{name}': {absent[0]}, which {read.name} names, is not there{more}")


def load_and_compare(kind: ModelLoader, name: str | None, **options: Any) -> tuple[PreTrainedModel, Gaps]:  # noqa: ANN401
    """Loads a checkpoint without Hub kernels, and returns its gaps, which have random values."""
    how = {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_kernels": False}
    model, info = kind.from_pretrained(name, **how, **options)
    # classes create integer buffers, such as positions and batch counts
    created = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    return model, Gaps(sorted({*info["missing_keys"]} - created), sorted(info["mismatched_keys"]))


def load_complete(kind: ModelLoader, name: str, **options: Any) -> PreTrainedModel:  # noqa: ANN401 - from_pretrained's own
    """Loads a checkpoint that contains all tensors, as `check_complete` requires."""
    model, gaps = load_and_compare(kind, name, **options)
    check_complete(model, gaps, name)
    return model


def check_complete(model: PreTrainedModel, gaps: Gaps, name: str) -> None:
    """Raises if a checkpoint lacks tensors of the loaded model, except for a new task head.

    Only tensors that the class in config.json does not have may be new. They are logged.

    Raises:
        ValueError: If the files lack other tensors, or have other sizes.
    """
    new = _added(model, gaps.missing)
    refuse_gaps(model, Gaps([key for key in gaps.missing if key not in new], gaps.mismatched), name)
    for key in new:
        setattr(model.get_submodule(key.rpartition(".")[0]), NEW, True)
    if new:
        rank_zero_info(f"'{name}': {', '.join(new)} of {type(model).__name__} not in the checkpoint, initialized randomly")


def refuse_gaps(model: PreTrainedModel, gaps: Gaps, name: str) -> None:
    """Raises if a checkpoint lacks tensors of a model, or has other sizes."""
    kind, missing = type(model).__name__, gaps.missing
    if len(missing) == 1:
        raise ValueError(f"'{name}': {missing[0]} of {kind} is missing in the files.")
    if missing:
        raise ValueError(f"'{name}': {len(missing)} tensors of {kind} are missing in the files, such as {missing[0]}.")
    if gaps.mismatched:
        raise ValueError(f"'{name}': {mismatch(model, gaps)}")


def mismatch(model: PreTrainedModel, gaps: Gaps) -> str:
    """Describes a tensor that has another size in the files."""
    key, file_size, model_size = gaps.mismatched[0]
    more = f"; {len(gaps.mismatched) - 1} more differ" if len(gaps.mismatched) > 1 else ""
    return f"{key} has size {list(file_size)} in the files, but {list(model_size)} in {type(model).__name__}{more}"


def _added(model: PreTrainedModel, missing: list[str]) -> list[str]:
    """Returns missing tensors that the saved class lacks."""
    if not missing:
        return []
    names: object = model.config.architectures
    name, prefix = names[0] if isinstance(names, list) and names else None, f"{model.base_model_prefix}."
    base, outside, poolers = model.base_model, set[str](), set[str]()
    builds = [vars(kind).get("__init__") for kind in type(base).__mro__]
    # a base model may have been saved without its pooler, which masked-token models do not use
    may_lack_pooler = any(build is not None and "add_pooling_layer" in signature(build).parameters for build in builds)
    for key in missing:
        if base is not model and not key.startswith(prefix):
            outside.add(key)
        if key.removeprefix(prefix).startswith("pooler.") and may_lack_pooler:
            poolers.add(key)
    saved: PreTrainedModel | None = model
    if name != type(model).__name__:
        kind = named_class(name)
        try:
            saved = build_or_refuse(kind, copy.deepcopy(model.config)) if kind is not None else None
        except ValueError:  # it is built from other configs
            saved = None
    if saved is None:
        return sorted(outside | poolers)
    names = saved.state_dict().keys()
    in_saved = set() if saved.base_model is saved else poolers & names
    in_saved |= {key for key in outside if names & {key, prefix + key}}
    return sorted((outside | poolers) - in_saved)
