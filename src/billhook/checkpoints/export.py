"""Exports a Lightning checkpoint to a Hugging Face folder, without the training script."""

import copy
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from billhook.adapters.checkpoint import base_checkpoint, restore_adapters
from billhook.atomic_folder import check_target
from billhook.checkpoints.card import LOSSES, current_names, listed
from billhook.checkpoints.origin import origin_of
from billhook.checkpoints.save import Saved, save
from billhook.checkpoints.verify import Probe, logits_of, make_probe
from billhook.engine.sharded_files import is_sharded_checkpoint, read_sharded
from billhook.model.config_fields import build_class_on_meta, fields_of, set_fields
from billhook.model.constants import Difference, Number, Record, check_record, differences
from billhook.model.meta import model_class
from billhook.model.preprocessors import load_tokenizer
from billhook.model.shape import KEY, Shape, shape_of
from billhook.model.shaped import build_shaped
from billhook.model.transformers_internals import build_class, compute_experts_eagerly
from billhook.units.gates import zero_units
from billhook.units.units import Per

EVENT = ("number", "step", "what", "before", "after")
"""What each event of a fit says."""
TRAINED = "billhook_trained"
"""The key of Lightning checkpoints under which they keep how the model was trained."""


def history(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a training run: settings, events in order, and the degradation at its end if measured.

    What is not as billhook notes it, as anybody may have written the file, is left out.
    """
    callbacks, noted = checkpoint.get("callbacks"), checkpoint.get(TRAINED)
    events, degradation, record = list[Mapping[str, Any]](), list[Mapping[str, Any]](), dict[str, Any]()
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, Mapping):
            continue
        state = current_names(state)
        for event in listed(state, "events", EVENT):
            if type(event["number"]) is type(event["step"]) is int and _is_plain(event):
                events.append(event)
        degradation += filter(_is_plain, listed(state, "last", LOSSES))
        if _is_plain(start := state.get("start")) and start:  # first whether it is a mapping: a tensor is neither true nor false
            record.setdefault("start", dict(start))
    record["events"] = sorted(events, key=lambda event: (event["step"], event["number"]))
    facts = noted if isinstance(noted, Mapping) else {}
    record |= {name: dict(facts[name]) for name in ("training", "metrics") if _is_plain(facts.get(name))}
    return record | ({"degradation": degradation} if degradation else {})


def _is_plain(value: object) -> bool:
    """Tells whether a value is a mapping that JSON can say."""
    if not isinstance(value, Mapping):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_trained(model: PreTrainedModel, record: Record, name: str) -> None:
    """Refuses a rebuilt model that computes by other constants than are recorded of the one that was trained.

    They may differ where they change nothing of what the model computes of a probe, as rates of dropout and a size of the
    vocabulary from before it grew. To find out, yet another value is tried; what the file says is only compared.
    """
    differing = sorted(differences(model, record), key=lambda difference: difference.constant.attr)
    if not differing:
        return
    probe = make_probe(model)
    expected = logits_of(model, probe)
    for _, alike in groupby(differing, key=lambda difference: difference.constant.attr):
        of_one_name = list(alike)
        if _counts(model, of_one_name, probe, expected):
            first = of_one_name[0]
            raise ValueError(
                f"'{name}' holds no {type(model).__name__} that computes what the trained one did: "
                f"{first.constant.name.removeprefix('.')} was {_shown(first.recorded)} in training, and its class makes "
                f"{_shown(first.now)} of the config in the checkpoint"
            )


def _shown(value: Number) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _counts(model: PreTrainedModel, differing: Sequence[Difference], probe: Probe, expected: Tensor) -> bool:
    """Tells whether other constants than the model's give other logits, or no logits."""
    with _others(differing):
        try:
            logits = logits_of(model, probe)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a model raises
            return True
    return not torch.equal(logits.nan_to_num(), expected.nan_to_num())


@contextmanager
def _others(differing: Sequence[Difference]) -> Iterator[None]:
    """Gives a model other constants for a while."""
    constants = [difference.constant for difference in differing]
    before = [constant.value for constant in constants]
    try:
        for constant, value in zip(constants, before, strict=True):
            constant.holder[constant.attr] = _other(value)
        yield
    finally:
        for constant, value in zip(constants, before, strict=True):
            constant.holder[constant.attr] = value


def _other(value: Any) -> Any:  # noqa: ANN401 - a number or a tensor
    """Makes a number that is as legal: a probability stays one, and a place in a table is one in the table."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            return torch.where(value == 0, 0.5, value / 2).to(value.dtype)
        return ~value if value.dtype == torch.bool else torch.where(value > 0, value - 1, value + 1)
    if value is None or isinstance(value, bool):
        return 1 if value is None else not value
    if isinstance(value, int):
        return value - 1 if value > 0 else value + 1
    return value + 0.5 if 0 <= value <= 0.5 else value / 2 if math.isfinite(value) else 1.0


IGNORED = {
    *("auto_map", "custom_pipelines", "trust_remote_code", "quantization_config"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    KEY,
}
"""Config fields that make transformers fetch code, choose kernels, or that billhook wrote."""
MASKED = "billhook_masked_heads"
"""The key of Lightning checkpoints under which they keep which heads are masked."""
REPEATED = re.compile("(layers?|depths?|blocks|experts)$")
"""Config fields that set how often something is built."""


def export(ckpt: str | Path, out: str | Path, tokenizer: str | None = None) -> Saved:
    """Turns a Lightning checkpoint that billhook's callbacks or module wrote into a Hugging Face folder, verified.

    The model is rebuilt of the config, shape and weights in the checkpoint, every weight by its name and size. The numbers and
    unsaved buffers by which it computes are compared with those that the checkpoint records of the model that was trained, such
    as the scale of embeddings; one of an older billhook records none. Then the folder is loaded again, and its logits are
    compared with those of the rebuilt model. The trained model's own logits are not known here: they would take a forward at
    every checkpoint. So code that a script put in the place of the class's own is not seen. The record and the model card say
    what callbacks have noted in the checkpoint: events, and degradation, which is measured right after events and at the end.

    Args:
        ckpt: The Lightning checkpoint: a .ckpt file, or the folder of a sharded one, which needs no process group.
        out: The folder to write; new, empty, or an earlier export.
        tokenizer: The tokenizer to save with the model, a name or folder; by default the one that training started from.

    Raises:
        ValueError: If the file is not a Lightning checkpoint that billhook can read, `out` holds something else, or the model
            that was trained computed by other numbers than its class makes of the config.
    """
    check_target(out)
    checkpoint = read_checkpoint(ckpt)
    base = base_checkpoint(checkpoint, str(ckpt))
    model = build_model(base, str(ckpt))
    if constants := base[KEY].get("constants"):
        check_trained(model, constants, str(ckpt))
    restore_adapters(model, checkpoint, str(ckpt))
    _zero_masked(model, checkpoint.get(MASKED), str(ckpt))
    steps, name = checkpoint.get("global_step", 0), checkpoint[KEY]["name_or_path"]
    record = {"exported_from": Path(ckpt).name, "steps": steps if isinstance(steps, int) else None, **history(checkpoint)}
    record |= origin_of(name or "", model.config)
    return save(model, out, _find_tokenizer(tokenizer, name, model), record)


def _zero_masked(model: PreTrainedModel, masked: Any, name: str) -> None:  # noqa: ANN401 - what a file holds
    """Zeroes the weights that read heads which were masked in training."""
    if masked is None:
        return
    heads = masked.get("heads") if isinstance(masked, dict) else None
    if not isinstance(heads, dict) or not all(isinstance(numbers, list) for numbers in heads.values()):
        raise ValueError(f"'{name}' does not say which heads are masked as billhook writes it")
    zero_units(model, heads, per=cast(Per, masked.get("per")))  # which is checked there


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a Lightning checkpoint as data; nothing in it can run code, and its tensors stay in its files."""
    sharded = is_sharded_checkpoint(Path(path))
    if not (sharded or Path(path).is_file()):
        raise ValueError(f"'{path}' is neither a Lightning checkpoint (.ckpt) nor a folder of its shards: one of them is needed")
    try:
        checkpoint = read_sharded(Path(path)) if sharded else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a Lightning checkpoint: {error}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"'{path}' is not a Lightning checkpoint: it has no state_dict of tensors")
    if not (record := checkpoint.get(KEY)):
        raise ValueError(f"'{path}' was not written with a billhook callback or module: it does not say what model it holds")
    kinds = {"class": str, "config": str, "prefix": str, "shape": dict, "name_or_path": str | None}
    wrong = [k for k, kind in kinds.items() if not isinstance(record, dict) or k not in record or not isinstance(record[k], kind)]
    if wrong:
        raise ValueError(f"'{path}' does not say what model it holds as billhook writes it: {wrong[0]} is missing or wrong")
    try:
        check_record(record.get("constants", {"numbers": {}, "buffers": {}}))  # an older billhook recorded none
    except ValueError as error:
        raise ValueError(f"'{path}' does not say what model it holds as billhook writes it: {error}") from None
    return cast(dict[str, Any], checkpoint)


def build_model(checkpoint: dict[str, Any], name: str) -> PreTrainedModel:
    """Builds the Hugging Face model that a Lightning checkpoint holds.

    It is built on meta tensors first, and takes memory only when its sizes are those of the tensors in the checkpoint. Where its
    class builds other sizes from the config, it takes those that the checkpoint records and holds.
    """
    record, prefix = checkpoint[KEY], checkpoint[KEY]["prefix"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if adapted := next((key for key in state if ".base_layer." in key), None):
        raise ValueError(
            f"'{name}' holds adapters beside the weights ({adapted}), but not how they are scaled: load it in the script that "
            "wrote it, and save the model from there (bh.save, or the callback Export)"
        )
    try:
        shape = Shape.from_dict(record["shape"])
        config = _read_config(record, shape, limit=1000 + len(state))
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
        raise ValueError(f"'{name}' holds no {record['class'][:80]} that can be built: {error}") from error
    return model


def _read_config(record: dict[str, Any], shape: Shape, limit: int) -> PretrainedConfig:
    """Makes the config that a checkpoint holds; fields that its class derives from others are as they were."""
    fields = _harmless(json.loads(record["config"], object_hook=_number), limit)
    config: PretrainedConfig = transformers.AutoConfig.for_model(**{**copy.deepcopy(fields), "architectures": [record["class"]]})
    derived = {name: shape.config[name] for name, value in fields_of(config).items() if shape.config.get(name, value) != value}
    for name, stated in derived.items():
        if _within(fields, name) != stated:
            raise ValueError(f"config and shape do not agree on {name}")
    set_fields(config, derived)
    return config


def _number(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    """Reads what transformers writes in the place of a number that JSON lacks."""
    stated = fields.get("__float__") if len(fields) == 1 else None
    return float(stated) if stated in ("Infinity", "-Infinity", "NaN") else fields


def _within(fields: Any, name: str) -> object:  # noqa: ANN401 - any JSON
    first, _, rest = name.partition(".")
    value = fields.get(first) if isinstance(fields, dict) else None
    return _within(value, rest) if rest else value


def _harmless(fields: Any, limit: int) -> Any:  # noqa: ANN401 - any JSON
    """Drops the fields of a config that make transformers fetch code or choose kernels.

    Raises:
        ValueError: If there are more layers than `limit`; even empty ones take memory.
    """
    if isinstance(fields, list):
        return [_harmless(value, limit) for value in fields]
    if not isinstance(fields, dict):
        return fields
    for key, value in fields.items():
        counts = value if isinstance(value, list) else [value]
        if REPEATED.search(key) and any(isinstance(count, int) and count > limit for count in counts):
            raise ValueError(f"{key}={value} is more than there are tensors")
    return {key: _harmless(value, limit) for key, value in fields.items() if key not in IGNORED and not key.startswith("__")}


def _check_sizes(shadow: PreTrainedModel, recorded: Shape, state: dict[str, Tensor]) -> bool:
    """Refuses a shape that is not that of the tensors; returns True if it is also what the config builds."""
    built = shape_of(shadow)
    for name in [*built.tensors, *recorded.tensors]:
        in_weights = tuple(state[name].shape) if name in state else None
        sizes = {"config": built.tensors.get(name), "shape": recorded.tensors.get(name), "weights": in_weights}
        if in_weights != sizes["shape"] or len({None if size is None else len(size) for size in sizes.values()}) > 1:
            listed = ", ".join(f"{size or 'not there'} by its {where}" for where, size in sizes.items())
            raise ValueError(f"{name} is {listed}")
    if sum(buffer.numel() for buffer in shadow.buffers()) > 10**8 + 10 * sum(tensor.numel() for tensor in state.values()):
        raise ValueError("the config asks for far more than the checkpoint holds")
    return built.tensors == recorded.tensors


def _find_tokenizer(requested: str | None, started_from: str | None, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    name = requested or (started_from if model.main_input_name == "input_ids" else None)
    if not name:
        return None
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        if requested:
            raise ValueError(f"tokenizer: none can be read from '{requested}': {error}") from error
        warnings.warn(f"no tokenizer is saved along, since none can be read from '{name}'; name one", stacklevel=3)
        return None
