"""One run on meta tensors: which dimensions of which parameters are the same axis."""

import copy
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from billhook.arguments import annotated
from billhook.engine.batches import check_one_device
from billhook.model.config_fields import configs_of
from billhook.model.find import check_dense, find_transformer
from billhook.model.inputs import make_inputs
from billhook.model.memory import placed, remembered
from billhook.model.meta import from_config, from_name, to_meta
from billhook.model.transformers_internals import attention_of, compute_every_expert, set_attention
from billhook.tracing.axes import Axis, mark
from billhook.tracing.coupling import Structure, couple
from billhook.tracing.mode import recording
from billhook.tracing.tape import Note, Rows, Tape, axes_of, join, line_of, mark_units, memory_of, note, pay, tensors

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor
Shapes = dict[str, tuple[int, ...]]

_alone = threading.RLock()  # a run replaces a method of torch's tensors, for all threads


def trace(model: nn.Module | PretrainedConfig | str | os.PathLike[str], example_inputs: Inputs | None = None) -> Structure:
    """Finds what belongs together in a model, from one run on meta tensors: no weights, no gradients, no architecture table.

    Every dimension of every parameter gets an axis; each op of the forward says which axes are the same. What comes out is exact,
    or it is marked opaque with the op to blame.

    Args:
        model: A model on any device (nothing of it is changed or computed), also with LoRA attached or inside another module,
            such as a LightningModule; or a config; or a folder, a config.json, a hub name or "tiny": the config alone is read.
        example_inputs: What the forward takes: keyword arguments by name, or positional ones; only shapes and dtypes count.
            By default guessed from the config; a module that is not of transformers needs them. With them the module is traced as
            it is, heads and all; without them, the Hugging Face model in it.

    Raises:
        ValueError: If inputs are needed and cannot be guessed, or the forward does not run on meta tensors: the message names the
            inputs, or the op and the line of the model's code.

    Example:
        >>> import billhook as bh
        >>> structure = bh.trace(bh.load("tiny"))
        >>> [(group.kind, group.size) for group in structure.groups if not group.reason][:3]
        [('residual', 256), ('head', 8), ('value', 32)]
    """
    _check(model, example_inputs)
    annotated(trace, locals())
    with _alone, torch.inference_mode(False), torch.device("cpu"):  # whatever is on around
        subject, outside = _subject(model, example_inputs is not None)
        check_one_device(subject)  # accelerate's hooks would go along with a copy, and move what it is given
        check_dense(subject)
        find = partial(_find, subject, outside, example_inputs)
        if example_inputs is not None or not isinstance(subject, PreTrainedModel):
            return find()
        return remembered(find, subject, "structure", *outside.items())


def _find(subject: nn.Module, outside: Shapes, example_inputs: Inputs | None) -> Structure:
    try:
        return _run(to_meta(subject), outside, example_inputs, everything=True)
    except _EntriesDiffer as error:  # code for which not every entry can be taken: then one, if that is enough to see all
        structure = _run(to_meta(subject), outside, example_inputs, everything=False)
        if structure.untouched:
            raise ValueError(str(error)) from error
        return structure


class _EntriesDiffer(ValueError):
    """The forward failed after code had asked which entries are not zero."""


def _check(model: object, inputs: object) -> None:
    if not isinstance(model, nn.Module | PretrainedConfig | str | os.PathLike):
        raise ValueError(f"model: a module, a config or a name is needed, not {type(model).__name__}")
    if not isinstance(inputs, Tensor | Mapping | list | tuple | None):
        raise ValueError(f"example_inputs: a dictionary, a tuple or a tensor is needed, not {type(inputs).__name__}")
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    for name, parameter in parameters:
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model: its parameter {name} has no shape before the first forward (a lazy module); run it once")


def _run(shadow: nn.Module, outside: Shapes, example_inputs: Inputs | None, everything: bool) -> Structure:
    args, kwargs = _arguments(shadow, example_inputs)
    _prepare(shadow)
    tape, vocab = _tape(shadow), _vocabulary(shadow)
    noted = [_noted(value, vocab if isinstance(shadow, PreTrainedModel) else None) for value in args]
    named = {key: _noted(value, vocab if "input_ids" in key else None) for key, value in kwargs.items()}
    try:
        with recording(tape, shadow, everything):
            output = shadow(*noted, **named)
    except Exception as error:  # whatever a model's own code raises
        kind = _EntriesDiffer if everything and any(what.startswith("nonzero") for what in tape.assumed) else ValueError
        names = ", ".join(map(str, kwargs)) or f"{len(args)} of them"
        guessed, given = f"guessed inputs ({names}; example_inputs would replace them)", f"these example_inputs ({names})"
        raise kind(_refusal(shadow, tape, error, guessed if example_inputs is None else given)) from error
    _close(output, vocab)
    return couple(shadow, tape, outside)


def _subject(module: nn.Module | PretrainedConfig | str | os.PathLike[str], whole: bool) -> tuple[nn.Module, Shapes]:
    """Returns what is traced, and the parameters next to it: all of a module, or the Hugging Face model that it holds.

    Raises:
        ValueError: If it holds several and none is the one to work on.
    """
    if not isinstance(module, nn.Module):
        return (from_config(module) if isinstance(module, PretrainedConfig) else from_name(module)), {}
    while (inner := _inner(module)) is not None:
        module = inner
    if whole or not any(isinstance(child, PreTrainedModel) for child in module.modules()):
        return module, {}
    try:
        model: nn.Module = find_transformer(module)
    except ValueError as error:
        raise ValueError(f"model: {error}; or pass that one alone") from error
    if model is module:
        return model, {}
    model = next((child for child in module.modules() if _prompts(child) and model in child.modules()), model)
    inside = [child for child in module.modules() if isinstance(child, PreTrainedModel) or child is model]
    own = {id(parameter) for child in inside for parameter in child.parameters()}
    return model, {name: tuple(p.shape) for name, p in module.named_parameters() if id(p) not in own}


def _inner(module: nn.Module) -> nn.Module | None:
    """Returns what a wrapper without parameters of its own wraps: torch.compile, DDP, PEFT."""
    wrapper: Any = module
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module | None = wrapper.module
    elif hasattr(module, "get_base_model") and not _prompts(module):
        inner = wrapper.get_base_model()
    else:
        inner = getattr(module, "_orig_mod", None)
    return inner


def _prompts(module: nn.Module) -> bool:
    """Tells whether PEFT puts prompts before the model that a module wraps: parameters that no forward of that model uses."""
    adapters = getattr(module, "peft_config", None)
    values = adapters.values() if isinstance(adapters, Mapping) else ()
    return hasattr(module, "get_base_model") and any(getattr(one, "is_prompt_learning", False) for one in values)


def _arguments(shadow: nn.Module, given: Inputs | None) -> tuple[list[Any], dict[str, Any]]:
    if given is None and not isinstance(shadow, PreTrainedModel) and not _prompts(shadow):
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
    """Chooses those of transformers' ways to compute the same that run on meta."""
    compute_every_expert(shadow)
    for config in configs_of(shadow):
        if attention_of(config) not in ("eager", "sdpa"):
            set_attention(config, "eager")


def _tape(shadow: nn.Module) -> Tape:
    tape = Tape()
    for name, tensor in [*shadow.named_parameters(), *shadow.named_buffers()]:
        tape.parameters[name] = tensor
        tape.storages[memory_of(tensor)] = name
        fresh = note(tensor)
        fresh.sources, fresh.used = {(name, -1): Rows(None)}, False
    for hook in placed(shadow):
        notes = tape.assumed if hook.harmless else tape.misses
        notes[hook.says] = notes.get(hook.says, 0) + 1
        hook.note = partial(_opaque, hook.says)
    config = getattr(shadow, "config", None)
    if getattr(config, "quantization_config", None) is not None and not hasattr(shadow, "hf_quantizer"):
        tape.assumed["the config is of a quantised model: taken as not quantised, also what its bytes are"] = 1
    return tape


def _opaque(reason: str, given: object) -> None:
    """Marks every axis of the tensors that a hook could have replaced."""
    for tensor in tensors(given):
        for axis in axes_of(tensor):
            mark(axis, "opaque", reason)


def _vocabulary(shadow: nn.Module) -> Axis | None:
    """Makes the axis of token ids."""
    model = next((child for child in shadow.modules() if isinstance(child, PreTrainedModel)), None)
    if model is None:
        return None
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(table, Tensor) or table.dim() != 2:
        return None
    return Axis(table.shape[0], notes={"vocab": "token ids"})


def _noted(value: Any, vocab: Axis | None) -> Any:  # noqa: ANN401 - whatever a forward takes
    """Makes an input on meta, every dimension of it data."""
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
    """Marks what leaves the model, as others see it: logits are over the vocabulary or over labels, the rest is output."""
    fields = dict(output.items()) if isinstance(output, Mapping) else {}
    answers = {key: one for key, one in fields.items() if "logits" in str(key) and isinstance(one, Tensor) and one.dim()}
    for logits in answers.values():
        _answered(logits, vocab)
    if isinstance(output, ModelOutput) and {"logits", "prediction_logits"} & answers.keys():
        return  # the other fields are what the model says of itself: states, caches
    for tensor in tensors([one for key, one in fields.items() if key not in answers] if fields else output):
        pay(note(tensor))
        mark_units(note(tensor).axes, "output", "the model's output has it, so that whatever reads the output must follow")


def _answered(logits: Tensor, vocab: Axis | None) -> None:
    pay(note(logits))
    *places, last = note(logits).axes
    mark_units(places, "output", "the positions of what the model answers")
    if vocab is not None and last.size == vocab.size:
        join(last, vocab)
    else:
        mark_units([last], "label", "what the model answers")


def _refusal(shadow: nn.Module, tape: Tape, error: Exception, inputs: str) -> str:
    first = str(error).strip().splitlines()
    op = f", op {tape.op}" if tape.op else ""
    assumed = f" (before that, {next(iter(tape.assumed))})" if tape.assumed else ""
    return (
        f"{type(shadow).__name__} does not run on meta tensors with {inputs}: at {line_of(error) or '?'}{op}: "
        f"{type(error).__name__}: {first[0] if first else ''}{assumed}"
    )
