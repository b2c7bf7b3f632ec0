"""One run on meta tensors: which dimensions of which parameters are the same axis."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.structure.axes import Axis, mark, unify
from billhook.structure.coupling import Structure, couple
from billhook.structure.inputs import make_inputs
from billhook.structure.meta import from_config, from_name, to_meta
from billhook.structure.mode import recording
from billhook.structure.shape import find_transformer
from billhook.structure.tape import Note, Rows, Tape, is_data, note, pay, tensors

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


def trace(model: nn.Module | PretrainedConfig | str, example_inputs: Inputs | None = None) -> Structure:
    """Finds what belongs together in a model, from one run on meta tensors: no weights, no gradients, no architecture table.

    Every dimension of every parameter gets an axis; each op of the forward says which axes are the same. What comes out is exact,
    or it is marked opaque with the op to blame.

    Args:
        model: A model on any device (nothing of it is changed or computed), also with LoRA attached or inside a LightningModule;
            or a config; or a folder, a config.json, a hub name or "tiny", of which the config alone is read.
        example_inputs: What the forward takes: keyword arguments by name, or positional ones; only shapes and dtypes count.
            By default guessed from the config; a module that is not of transformers needs them.

    Raises:
        ValueError: If inputs are needed and cannot be guessed, or the forward does not run on meta tensors: the message names the
            inputs, or the op and the line of the model's code.
    """
    try:
        return _run(_shadow(model), example_inputs, everything=True)
    except _EntriesDiffer as error:  # code for which not every entry can be taken: then one, if that is enough to see all
        structure = _run(_shadow(model), example_inputs, everything=False)
        if structure.untouched:
            raise ValueError(str(error)) from error
        return structure


class _EntriesDiffer(ValueError):
    """The forward failed after code had asked which entries are not zero."""


def _shadow(model: nn.Module | PretrainedConfig | str) -> nn.Module:
    if isinstance(model, str):
        return from_name(model)
    return from_config(model) if isinstance(model, PretrainedConfig) else to_meta(_traceable(model))


def _run(shadow: nn.Module, example_inputs: Inputs | None, everything: bool) -> Structure:
    args, kwargs = _arguments(shadow, example_inputs)
    _prepare(shadow)
    tape, vocab = _tape(shadow), _vocabulary(shadow)
    args = _noted(args, vocab)
    kwargs = {key: _noted(value, vocab if "input_ids" in key else None) for key, value in kwargs.items()}
    try:
        with recording(tape, shadow, everything):
            output = shadow(*args, **kwargs)
    except Exception as error:  # whatever a model's own code raises
        kind = _EntriesDiffer if everything and any(what.startswith("nonzero") for what in tape.assumed) else ValueError
        raise kind(_refusal(shadow, tape, error, example_inputs is None)) from error
    _close(output, vocab)
    return couple(shadow, tape)


def _traceable(module: nn.Module) -> nn.Module:
    """The Hugging Face model in a module, or the module itself if it holds none."""
    module = getattr(module, "_orig_mod", module)
    if any(isinstance(child, PreTrainedModel) for child in module.modules()):
        return find_transformer(module)
    return module


def _arguments(shadow: nn.Module, given: Inputs | None) -> tuple[list[Any], dict[str, Any]]:
    if given is None and not isinstance(shadow, PreTrainedModel):
        given = getattr(shadow, "example_input_array", None)
        if given is None:
            raise ValueError(
                f"example_inputs: {type(shadow).__name__} is not a model of transformers, so what its forward takes cannot be "
                "guessed; pass it, as a dictionary or a tuple"
            )
    if given is None:
        return [], dict(make_inputs(shadow))
    if isinstance(given, Mapping):
        return [], dict(given)
    return ([given] if isinstance(given, Tensor) else list(given)), {}


def _prepare(shadow: nn.Module) -> None:
    """Chooses, of the ways in which transformers computes the same, those that run on meta."""
    for module in shadow.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            for own in (config, *(c for c in vars(config).values() if isinstance(c, PretrainedConfig))):
                own._experts_implementation = "batched_mm"
                if own._attn_implementation not in ("eager", "sdpa"):
                    own._attn_implementation = "eager"


def _tape(shadow: nn.Module) -> Tape:
    tape = Tape()
    for name, tensor in [*shadow.named_parameters(), *shadow.named_buffers()]:
        tape.parameters[name] = tensor
        tape.storages[tensor.untyped_storage()._cdata] = name
        fresh = note(tensor)
        fresh.sources, fresh.used = {(name, -1): Rows(None)}, False
    return tape


def _vocabulary(shadow: nn.Module) -> Axis | None:
    """The axis of token ids."""
    if not isinstance(shadow, PreTrainedModel):
        return None
    try:
        table = getattr(shadow.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(table, Tensor) or table.dim() != 2:
        return None
    return Axis(table.shape[0], notes={"vocab": "token ids"})


def _noted(value: Any, vocab: Axis | None) -> Any:  # noqa: ANN401 - whatever a forward takes
    """An input on meta, every dimension of it data."""
    if isinstance(value, Tensor):
        moved = torch.empty_like(value, device="meta")
        moved._billhook = Note([Axis(n, notes={"data": "an input"}) for n in value.shape], True)  # type: ignore[attr-defined]
        note(moved).points = vocab if not value.dtype.is_floating_point else None
        return moved
    if isinstance(value, Mapping):
        return {key: _noted(one, vocab) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_noted(one, vocab) for one in value)
    return copy.copy(value)


def _close(output: Any, vocab: Axis | None) -> None:  # noqa: ANN401 - whatever a forward gives
    """What leaves the model is seen by others: logits are over the vocabulary or over labels, the rest is output."""
    fields = dict(output.items()) if isinstance(output, Mapping) else {}
    logits = fields.get("logits", fields.get("prediction_logits"))
    if isinstance(logits, Tensor) and logits.dim():
        pay(note(logits))
        last = note(logits).axes[-1]
        for axis in note(logits).axes[:-1]:
            if not is_data(axis):
                mark(axis, "output", "the positions of what the model answers")
        if vocab is not None and last.size == vocab.size:
            unify(last, vocab)
        else:
            mark(last, "label", "what the model answers")
        return
    for tensor in tensors(fields or output):
        pay(note(tensor))
        for axis in note(tensor).axes:
            if not is_data(axis):
                mark(axis, "output", "the model's output has it, so that whatever reads the output must follow")


def _refusal(shadow: nn.Module, tape: Tape, error: Exception, guessed: bool) -> str:
    frames, line = error.__traceback__, "?"
    while frames is not None:
        name = frames.tb_frame.f_code.co_filename
        if "/torch/" not in name and "billhook" not in name:
            line = f"{name.rsplit('/', 1)[-1]}:{frames.tb_lineno}"
        frames = frames.tb_next
    inputs = " with guessed inputs (example_inputs would replace them)" if guessed else ""
    first = str(error).strip().splitlines()
    assumed = f" (before that, {next(iter(tape.assumed))})" if tape.assumed else ""
    return (
        f"{type(shadow).__name__} does not run on meta tensors{inputs}: at {line}, op {tape.op}: "
        f"{type(error).__name__}: {first[0] if first else ''}{assumed}"
    )
