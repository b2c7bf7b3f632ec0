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

from billhook.arguments import check_types
from billhook.engine.batches import check_one_device
from billhook.model.cache import cached, stand_ins_in
from billhook.model.config_fields import configs_of
from billhook.model.find import check_dense, find_transformer
from billhook.model.inputs import make_inputs
from billhook.model.meta import from_config, from_name, to_meta
from billhook.model.transformers_internals import attention_of, compute_every_expert, set_attention
from billhook.tracing.axes import Axis, mark
from billhook.tracing.coupling import Structure, build_structure
from billhook.tracing.mode import recording
from billhook.tracing.tape import Note, Rows, Tape, apply_pending, axes_of, join, line_of, mark_units, memory_of, note, tensors

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
    check_types(trace, locals())
    with _alone, torch.inference_mode(False), torch.device("cpu"):  # whatever is on around
        subject, outside = _subject(model, example_inputs is not None)
        check_one_device(subject)  # accelerate's hooks would go along with a copy, and move its inputs
        check_dense(subject)
        find = partial(_find, subject, outside, example_inputs)
        if example_inputs is not None or not isinstance(subject, PreTrainedModel):
            return find()
        return cached(find, subject, "structure", *outside.items())


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


def _run(meta_model: nn.Module, outside: Shapes, example_inputs: Inputs | None, everything: bool) -> Structure:
    args, kwargs = _arguments(meta_model, example_inputs)
    _prepare(meta_model)
    tape, vocab = _tape(meta_model), _vocabulary(meta_model)
    noted = [_noted(value, vocab if isinstance(meta_model, PreTrainedModel) else None) for value in args]
    named = {key: _noted(value, vocab if "input_ids" in key else None) for key, value in kwargs.items()}
    try:
        with recording(tape, meta_model, everything):
            output = meta_model(*noted, **named)
    except Exception as error:  # whatever a model's own code raises
        kind = _EntriesDiffer if everything and any(what.startswith("nonzero") for what in tape.assumed) else ValueError
        names = ", ".join(map(str, kwargs)) or f"{len(args)} of them"
        guessed, stated = f"guessed inputs ({names}; example_inputs would replace them)", f"these example_inputs ({names})"
        raise kind(_refusal(meta_model, tape, error, guessed if example_inputs is None else stated)) from error
    _close(output, vocab)
    return build_structure(meta_model, tape, outside)


def _subject(module: nn.Module | PretrainedConfig | str | os.PathLike[str], all_of_it: bool) -> tuple[nn.Module, Shapes]:
    """Returns what is traced, and the parameters next to it: all of a module, or the Hugging Face model that it holds.

    Raises:
        ValueError: If it holds several and none is the one to work on.
    """
    if not isinstance(module, nn.Module):
        return (from_config(module) if isinstance(module, PretrainedConfig) else from_name(module)), {}
    while (inner := _inner(module)) is not None:
        module = inner
    if all_of_it or not any(isinstance(child, PreTrainedModel) for child in module.modules()):
        return module, {}
    try:
        model: nn.Module = find_transformer(module)
    except ValueError as error:
        raise ValueError(f"model: {error}; or pass that one alone") from error
    if model is module:
        return model, {}
    model = next((child for child in module.modules() if _prompts(child) and model in child.modules()), model)
    inside = [child for child in module.modules() if isinstance(child, PreTrainedModel) or child is model]
    of_model = {id(parameter) for child in inside for parameter in child.parameters()}
    return model, {name: tuple(p.shape) for name, p in module.named_parameters() if id(p) not in of_model}


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
    return hasattr(module, "get_base_model") and any(getattr(adapter, "is_prompt_learning", False) for adapter in values)


def _arguments(meta_model: nn.Module, inputs: Inputs | None) -> tuple[list[Any], dict[str, Any]]:
    if inputs is None and not isinstance(meta_model, PreTrainedModel) and not _prompts(meta_model):
        inputs = getattr(meta_model, "example_input_array", None)
        if inputs is None:
            raise ValueError(
                f"example_inputs: {type(meta_model).__name__} is not a model of transformers, so what its forward takes cannot "
                "be guessed; pass it, as a dictionary or a tuple"
            )
    if inputs is None:
        return [], dict(make_inputs(meta_model))
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    return ([inputs] if isinstance(inputs, Tensor) else list(inputs)), {}


def _prepare(meta_model: nn.Module) -> None:
    """Chooses those of transformers' ways to compute the same that run on meta."""
    compute_every_expert(meta_model)
    for config in configs_of(meta_model):
        if attention_of(config) not in ("eager", "sdpa"):
            set_attention(config, "eager")


def _tape(meta_model: nn.Module) -> Tape:
    tape = Tape()
    for name, tensor in [*meta_model.named_parameters(), *meta_model.named_buffers()]:
        tape.parameters[name] = tensor
        tape.storages[memory_of(tensor)] = name
        fresh = note(tensor)
        fresh.sources, fresh.used = {(name, -1): Rows(None)}, False
    for hook in stand_ins_in(meta_model):
        notes = tape.assumed if hook.harmless else tape.misses
        notes[hook.says] = notes.get(hook.says, 0) + 1
        hook.note = partial(_opaque, hook.says)
    config = getattr(meta_model, "config", None)
    if getattr(config, "quantization_config", None) is not None and not hasattr(meta_model, "hf_quantizer"):
        tape.assumed["the config is of a quantised model: taken as not quantised, also what its bytes are"] = 1
    return tape


def _opaque(reason: str, replaceable: object) -> None:
    """Marks every axis of the tensors that a hook could have replaced."""
    for tensor in tensors(replaceable):
        for axis in axes_of(tensor):
            mark(axis, "opaque", reason)


def _vocabulary(meta_model: nn.Module) -> Axis | None:
    """Makes the axis of token ids."""
    model = next((child for child in meta_model.modules() if isinstance(child, PreTrainedModel)), None)
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
        return {key: _noted(item, vocab) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_noted(item, vocab) for item in value)
    return copy.copy(value)


def _close(output: Any, vocab: Axis | None) -> None:  # noqa: ANN401 - whatever a forward gives
    """Marks what leaves the model, as others see it: logits are over the vocabulary or over labels, the rest is output."""
    fields = dict(output.items()) if isinstance(output, Mapping) else {}
    answers = {key: x for key, x in fields.items() if "logits" in str(key) and isinstance(x, Tensor) and x.dim()}
    for logits in answers.values():
        _answered(logits, vocab)
    if isinstance(output, ModelOutput) and {"logits", "prediction_logits"} & answers.keys():
        return  # the other fields are what the model says of itself: states, caches
    for tensor in tensors([x for key, x in fields.items() if key not in answers] if fields else output):
        apply_pending(note(tensor))
        mark_units(note(tensor).axes, "output", "the model's output has it, so that whatever reads the output must follow")


def _answered(logits: Tensor, vocab: Axis | None) -> None:
    apply_pending(note(logits))
    *places, last = note(logits).axes
    mark_units(places, "output", "the positions of what the model answers")
    if vocab is not None and last.size == vocab.size:
        join(last, vocab)
    else:
        mark_units([last], "label", "what the model answers")


def _refusal(meta_model: nn.Module, tape: Tape, error: Exception, inputs: str) -> str:
    first = str(error).strip().splitlines()
    op = f", op {tape.op}" if tape.op else ""
    assumed = f" (before that, {next(iter(tape.assumed))})" if tape.assumed else ""
    return (
        f"{type(meta_model).__name__} does not run on meta tensors with {inputs}: at {line_of(error) or '?'}{op}: "
        f"{type(error).__name__}: {first[0] if first else ''}{assumed}"
    )
