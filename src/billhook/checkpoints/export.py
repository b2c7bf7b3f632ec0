"""Export of Lightning checkpoints to Hugging Face folders, without the training script."""

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.adapters.checkpoint import base_checkpoint, restore_adapters
from billhook.atomic_folder import check_target
from billhook.checkpoints.card import LOSSES, WRITINGS, listed
from billhook.checkpoints.origin import origin_of
from billhook.checkpoints.save import Saved, save
from billhook.checkpoints.verify import logits_of, make_probe
from billhook.engine import is_sharded_checkpoint, read_sharded
from billhook.model import (
    KEY,
    Checkpoint,
    Shape,
    build_class,
    build_class_on_meta,
    build_shaped,
    compute_experts_eagerly,
    fields_of,
    load_tokenizer,
    model_class,
    record_constants,
    set_fields,
    shape_of,
)
from billhook.units import Per, zero_units

EVENT = ("number", "step", "what", "before", "after")
"""Keys that every recorded event has."""
ROUNDING = 1e-6
"""Relative tolerance for constants from another device."""
TRAINED = "billhook_trained"
"""Key of Lightning checkpoints for the training settings and metrics."""


def history(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the record of a training run: settings, events in order, and figures.

    Malformed entries are skipped, because the file may come from anywhere.
    """
    callbacks = checkpoint.get("callbacks")
    noted = checkpoint.get(TRAINED)
    events = list[Mapping[str, Any]]()
    degradation, written = list[Mapping[str, Any]](), list[Mapping[str, Any]]()
    record = dict[str, Any]()
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, Mapping):
            continue
        for event in listed(state, "events", EVENT):
            if type(event["number"]) is type(event["step"]) is int and _is_plain(event):
                events.append(event)
        degradation += filter(_is_plain, listed(state, "last", LOSSES))
        written += filter(_is_plain, listed(state, "written", WRITINGS))
        start = state.get("start")
        if _is_plain(start) and start:  # in this order, because the truth value of a tensor may raise
            record.setdefault("start", dict(start))
    record["events"] = sorted(events, key=lambda event: (event["step"], event["number"]))
    facts = noted if isinstance(noted, Mapping) else {}
    record |= {name: dict(facts[name]) for name in ("training", "metrics") if _is_plain(facts.get(name))}
    return record | ({"degradation": degradation} if degradation else {}) | ({"written": written} if written else {})


def _is_plain(value: object) -> bool:
    """Returns True for a mapping that JSON can represent."""
    if not isinstance(value, Mapping):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


IGNORED = {
    *("auto_map", "custom_pipelines", "trust_remote_code", "quantization_config"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    KEY,
}
"""Config fields that make transformers download code or select kernels, and billhook's entry."""
MASKED = "billhook_masked_heads"
"""Key of Lightning checkpoints for masked heads."""
REPEATED = re.compile("(layers?|depths?|blocks|experts)$")
"""Config fields that set the number of repeated modules."""


def export(ckpt: str | Path, out: str | Path, tokenizer: str | None = None) -> Saved:
    """Exports a Lightning checkpoint of billhook as a verified Hugging Face folder.

    The model is rebuilt from the config, shape, and weights in the checkpoint. Its constants and unsaved buffers, such as the
    embedding scale, are compared with those of the trained model. Then the folder is reloaded, and its logits are compared with
    those of the rebuilt model. The logits of the trained model are unknown, because recording them would need a forward pass at
    every checkpoint. Changes that a script made to the code of the class are therefore not detected. The record and the model
    card have the events and the degradation from the checkpoint.

    Args:
        ckpt: Lightning checkpoint: a .ckpt file, or the folder of a sharded checkpoint (no process group is needed).
        out: Output folder. It must be new, empty, or an earlier export.
        tokenizer: Name or folder of a tokenizer to save with the model. Defaults to the tokenizer that training started from.

    Raises:
        ValueError: If the file is not a Lightning checkpoint of billhook, `out` is not a billhook checkpoint, or constants of
            the trained model differ from those that its class derives from the config.
    """
    check_target(out)
    checkpoint = read_checkpoint(ckpt)
    base = base_checkpoint(checkpoint, str(ckpt))
    model = build_model(base, str(ckpt))
    tolerance = max(ROUNDING, 2 * torch.finfo(model.dtype).eps)
    for constant, now in record_constants(model).items():
        before = base[KEY]["constants"].get(constant, now)
        if not (math.isclose(now, before, rel_tol=tolerance) or math.isnan(now) and math.isnan(before)):
            raise ValueError(
                f"'{ckpt}': the rebuilt {type(model).__name__} differs from the trained model: {constant} was {before:.7g} in "
                f"training, but is {now:.7g} according to the config in the checkpoint"
            )
    restore_adapters(model, checkpoint, str(ckpt))
    if (masked := checkpoint.get(MASKED)) is not None:  # their consumer weights become zero
        heads = masked.get("heads") if isinstance(masked, dict) else None
        if not isinstance(heads, dict) or not all(isinstance(numbers, list) for numbers in heads.values()):
            raise ValueError(f"'{ckpt}' has a malformed entry '{MASKED}' for masked heads")
        zero_units(model, heads, per=cast(Per, masked.get("per")))  # checks `per`
    steps = checkpoint.get("global_step", 0)
    name = checkpoint[KEY]["name_or_path"]
    record = {"exported_from": Path(ckpt).name, "steps": steps if isinstance(steps, int) else None, **history(checkpoint)}
    record |= origin_of(name or "", model.config)
    return save(model, out, _find_tokenizer(tokenizer, name, model), record)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a Lightning checkpoint without running code; its tensors are memory-mapped."""
    sharded = is_sharded_checkpoint(Path(path))
    if not (sharded or Path(path).is_file()):
        raise ValueError(f"'{path}' is neither a Lightning checkpoint (.ckpt) nor a folder of its shards")
    try:
        checkpoint = read_sharded(Path(path)) if sharded else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a Lightning checkpoint: {error}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"'{path}' is not a Lightning checkpoint: it has no state_dict of tensors")
    record = checkpoint.get(KEY)
    if not record:
        raise ValueError(f"'{path}' has no entry '{KEY}', because no billhook callback or module wrote it")
    kinds = {"class": str, "config": str, "prefix": str, "shape": dict, "constants": dict, "name_or_path": str | None}
    for name, kind in kinds.items():
        if not isinstance(record, dict) or name not in record or not isinstance(record[name], kind):
            raise ValueError(f"'{path}' has a malformed entry '{KEY}': {name} is missing or wrong")
    if not all(type(value) is float for value in record["constants"].values()):
        raise ValueError(f"'{path}' has a malformed entry '{KEY}': its constants are not numbers")
    return cast(Checkpoint, checkpoint)


def build_model(checkpoint: Checkpoint, name: str) -> PreTrainedModel:
    """Builds the Hugging Face model in a Lightning checkpoint.

    It is built on the meta device first, and allocated only if its sizes match the tensors in the checkpoint. If its class builds
    different sizes from the config, the recorded sizes are used.
    """
    record = checkpoint[KEY]
    prefix = checkpoint[KEY]["prefix"]
    state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    for key in state:
        if ".base_layer." in key:
            raise ValueError(
                f"'{name}' contains adapters ({key}) without their scaling. Load it in the script that wrote it, and save the "
                "model there with bh.save or the Export callback."
            )
    try:
        shape = Shape.from_dict(record["shape"])
        fields = _harmless(json.loads(record["config"], object_hook=_number), limit=1000 + len(state))
        config = transformers.AutoConfig.for_model(**{**copy.deepcopy(fields), "architectures": [record["class"]]})
        derived = {key: shape.config[key] for key, value in fields_of(config).items() if shape.config.get(key, value) != value}
        for key, stated in derived.items():
            if _within(fields, key) != stated:
                raise ValueError(f"config and shape have different values of {key}")
        set_fields(config, derived)
        kind = model_class(config, name)
        with torch.random.fork_rng(devices=[]):
            plain = _check_sizes(build_class_on_meta(kind, copy.deepcopy(config)), shape, state)
            dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
            model = build_class(kind, config, dtype) if plain else build_shaped(kind, config, shape, state, dtype)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        model.train(False)
        compute_experts_eagerly(model)
        logits_of(model, make_probe(model))
    except Exception as error:
        raise ValueError(f"'{name}': its {record['class'][:80]} cannot be built: {error}") from error
    return model


def _number(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    """Decodes the substitute of transformers for a number that JSON lacks."""
    stated = fields.get("__float__") if len(fields) == 1 else None
    return float(stated) if stated in ("Infinity", "-Infinity", "NaN") else fields


def _within(fields: Any, name: str) -> object:  # noqa: ANN401 - any JSON
    first, _, nested = name.partition(".")
    value = fields.get(first) if isinstance(fields, dict) else None
    return _within(value, nested) if nested else value


def _harmless(fields: Any, limit: int) -> Any:  # noqa: ANN401 - any JSON
    """Drops fields that download code or select kernels; raises for more than `limit` layers."""
    if isinstance(fields, list):
        return list(map(partial(_harmless, limit=limit), fields))
    if not isinstance(fields, dict):
        return fields
    for key, value in fields.items():
        counts = value if isinstance(value, list) else [value]
        if REPEATED.search(key) and any(isinstance(count, int) and count > limit for count in counts):
            raise ValueError(f"{key}={value} exceeds the number of tensors")
    return {key: _harmless(value, limit) for key, value in fields.items() if key not in IGNORED and not key.startswith("__")}


def _check_sizes(meta_model: PreTrainedModel, recorded: Shape, state: dict[str, Tensor]) -> bool:
    """Checks the recorded shape; returns True if the config builds the same."""
    built = shape_of(meta_model)
    for name in [*built.tensors, *recorded.tensors]:
        in_weights = tuple(state[name].shape) if name in state else None
        sizes = {"config": built.tensors.get(name), "shape": recorded.tensors.get(name), "weights": in_weights}
        if in_weights != sizes["shape"] or len({None if size is None else len(size) for size in sizes.values()}) > 1:
            details = ", ".join(f"{'missing' if size is None else size} in the {source}" for source, size in sizes.items())
            raise ValueError(f"the size of {name} is {details}")
    if sum(map(Tensor.numel, meta_model.buffers())) > 10**8 + 10 * sum(map(Tensor.numel, state.values())):
        raise ValueError("the buffers of the config are much larger than the checkpoint")
    return built.tensors == recorded.tensors


def _find_tokenizer(requested: str | None, started_from: str | None, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    name = requested or (started_from if model.main_input_name == "input_ids" else None)
    if not name:
        return None
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        if requested:
            raise ValueError(f"tokenizer='{requested}' cannot be loaded: {error}") from error
        warnings.warn(f"no tokenizer was saved, because none can be loaded from '{name}'. Pass tokenizer=.", stacklevel=3)
        return None
