"""Dependency tracing: finds coupled parameter dimensions in a run on meta tensors."""

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
from billhook.engine import check_one_device, cpu_by_default
from billhook.model import (
    attention_of,
    base_of,
    cached,
    check_dense,
    compute_every_expert,
    configs_of,
    find_transformer,
    from_config,
    from_name,
    is_adapter,
    make_inputs,
    set_attention,
    stacks_of,
    stand_ins_in,
    to_meta,
)
from billhook.tracing.axes import Axis, mark
from billhook.tracing.coupling import Shapes, Structure, build_structure
from billhook.tracing.mode import recording
from billhook.tracing.tape import Note, Rows, Tape, apply_pending, axes_of, join, line_of, mark_units, memory_of, note, tensors

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor

_patch_lock = threading.RLock()  # a run patches a method of torch's tensors, for all threads


@cpu_by_default()
def trace(model: nn.Module | PretrainedConfig | str | os.PathLike[str], example_inputs: Inputs | None = None) -> Structure:
    """Traces coupled dimensions in a run on the meta device.

    It needs no weights, gradients, or architecture table. Every dimension of every parameter gets an axis, and each operation of
    the forward pass relates axes. The result is exact, or marked as opaque with the untraceable operation.

    Args:
        model: A model on any device, which is not changed or run, also with LoRA or inside another module such as a
            LightningModule. Or a config, a folder, a config.json, a Hub name, or "tiny", of which only the config is read.
        example_inputs: Inputs of the forward pass: keyword arguments by name, or positional arguments. Only shapes and dtypes
            matter. Required for modules that are not from transformers. With inputs, the module is traced as a whole; without,
            the Hugging Face model in it. Defaults to inputs guessed from the config.

    Raises:
        ValueError: If inputs are needed and cannot be guessed, or the forward pass does not run on meta. The message names the
            inputs, or the operation and the line of the model's code.

    Example:
        >>> import billhook as bh
        >>> structure = bh.trace(bh.load("tiny"))
        >>> [(group.kind, group.size) for group in structure.groups if not group.reason][:3]
        [('residual', 256), ('head', 8), ('value', 32)]
    """
    check_types(trace, locals())
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model: parameter {name} is lazy and has no shape yet. Run the model once first.")
    with _patch_lock, torch.inference_mode(False), torch.device("cpu"):  # overrides any active inference mode or default device
        subject, outside = _subject(model, example_inputs is not None)
        check_one_device(subject)  # accelerate's hooks would be copied, too, and move inputs
        check_dense(subject)
        find = partial(_find, subject, outside, example_inputs)
        if example_inputs is not None or not isinstance(subject, PreTrainedModel):
            return find()
        return cached(find, subject, "structure", *outside.items())


def _find(subject: nn.Module, outside: Shapes, example_inputs: Inputs | None) -> Structure:
    try:
        return _run(to_meta(subject), outside, example_inputs, everything=True)
    except _EntriesDiffer as error:  # code that fails on all entries: retry with the first, if that uses every parameter
        structure = _run(to_meta(subject), outside, example_inputs, everything=False)
        if structure.untouched:
            raise ValueError(str(error)) from error
        return structure


class _EntriesDiffer(ValueError):
    """The forward pass failed after code asked for nonzero entries."""


def _run(meta_model: nn.Module, outside: Shapes, example_inputs: Inputs | None, everything: bool) -> Structure:
    args, kwargs = _arguments(meta_model, example_inputs)
    compute_every_expert(meta_model)
    for nested in configs_of(meta_model):
        if attention_of(nested) not in ("eager", "sdpa"):  # other implementations do not run on meta
            set_attention(nested, "eager")
    tape = Tape()
    vocab = _vocabulary(meta_model)
    for name, tensor in [*meta_model.named_parameters(), *meta_model.named_buffers()]:
        tape.parameters[name] = tensor
        tape.storages[memory_of(tensor)] = name
        fresh = note(tensor)
        fresh.sources = {(name, -1): Rows(None)}
        fresh.used = False
    for hook in stand_ins_in(meta_model):
        (tape.assumed if hook.harmless else tape.misses)[hook.says] += 1
        hook.note = partial(_opaque, hook.says)
    config = getattr(meta_model, "config", None)
    if getattr(config, "quantization_config", None) is not None and not hasattr(meta_model, "hf_quantizer"):
        tape.assumed["the config is of a quantized model: traced as not quantized, bytes included"] = 1
    noted = _noted(args, vocab if isinstance(meta_model, PreTrainedModel) else None)
    named = {key: _noted(value, vocab if "input_ids" in key else None) for key, value in kwargs.items()}
    for name, module in meta_model.named_modules():
        if is_adapter(module) and stacks_of(base_of(module)):  # torch cannot parametrize on the meta device
            raise ValueError(
                f"model: parameters of {name} have an adapter (target_parameters), which cannot be traced. Merge it first with "
                "bh.training.merge, or attach it after the model is changed."
            )
    try:
        with recording(tape, meta_model, everything):
            output = meta_model(*noted, **named)
    except Exception as error:  # whatever a model's own code raises
        kind = _EntriesDiffer if everything and any(what.startswith("nonzero") for what in tape.assumed) else ValueError
        names = ", ".join(map(str, kwargs)) or f"{len(args)} of them"
        guessed = f"guessed inputs ({names}; example_inputs would replace them)"
        stated = f"these example_inputs ({names})"
        first, *_ = [*str(error).strip().splitlines(), ""]
        op = f", op {tape.op}" if tape.op else ""
        assumed = f" (before that, {next(iter(tape.assumed))})" if tape.assumed else ""
        raise kind(
            f"{type(meta_model).__name__} does not run on meta tensors with {guessed if example_inputs is None else stated}: at "
            f"{line_of(error) or '?'}{op}: {type(error).__name__}: {first}{assumed}"
        ) from error
    _close(output, vocab)
    return build_structure(meta_model, tape, outside)


def _subject(subject: nn.Module | PretrainedConfig | str | os.PathLike[str], all_of_it: bool) -> tuple[nn.Module, Shapes]:
    """Returns the module to trace, or the model in it, and shapes of parameters outside."""
    if not isinstance(subject, nn.Module):
        return (from_config(subject) if isinstance(subject, PretrainedConfig) else from_name(subject)), {}
    inner: Any = subject
    while True:  # inside wrappers without parameters: DDP, PEFT, torch.compile
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model") and not _prompts(inner):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            break
    module: nn.Module = inner
    if all_of_it or not any(isinstance(child, PreTrainedModel) for child in module.modules()):
        return module, {}
    try:
        model: nn.Module = find_transformer(module)
    except ValueError as error:
        raise ValueError(f"model: {str(error).removesuffix('.')}. Or pass only the model to trace.") from error
    if model is module:
        return model, {}
    model = next((child for child in module.modules() if _prompts(child) and model in child.modules()), model)
    of_model = set[int]()
    for child in module.modules():
        if isinstance(child, PreTrainedModel) or child is model:
            of_model.update(map(id, child.parameters()))
    return model, {name: tuple(p.shape) for name, p in module.named_parameters() if id(p) not in of_model}


def _prompts(module: nn.Module) -> bool:
    """Returns whether PEFT adds prompts, which no forward pass of the wrapped model uses."""
    adapters = getattr(module, "peft_config", None)
    values = adapters.values() if isinstance(adapters, Mapping) else ()
    return hasattr(module, "get_base_model") and any(getattr(adapter, "is_prompt_learning", False) for adapter in values)


def _arguments(meta_model: nn.Module, inputs: Inputs | None) -> tuple[list[Any], dict[str, Any]]:
    if inputs is None and not isinstance(meta_model, PreTrainedModel) and not _prompts(meta_model):
        inputs = getattr(meta_model, "example_input_array", None)
        if inputs is None:
            raise ValueError(
                f"example_inputs=None: {type(meta_model).__name__} is not a transformers model, so its inputs cannot be guessed. "
                "Pass a dictionary or a tuple."
            )
    if inputs is None:
        return [], dict(make_inputs(meta_model))
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    return ([inputs] if isinstance(inputs, Tensor) else list(inputs)), {}


def _opaque(reason: str, replaceable: object) -> None:
    """Marks every axis of the tensors that a hook may have replaced."""
    for tensor in tensors(replaceable):
        for axis in axes_of(tensor):
            mark(axis, "opaque", reason)


def _vocabulary(meta_model: nn.Module) -> Axis | None:
    model: Any = next((child for child in meta_model.modules() if isinstance(child, PreTrainedModel)), None)
    try:
        table = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        return None
    return Axis(table.shape[0], notes={"vocab": "token ids"}) if isinstance(table, Tensor) and table.dim() == 2 else None


def _noted(value: Any, vocab: Axis | None) -> Any:  # noqa: ANN401 - whatever a forward takes
    """Returns an input on meta with data axes."""
    if isinstance(value, Tensor):
        moved = torch.empty_like(value, device="meta")
        moved._billhook = Note([Axis(n, notes={"data": "an input"}) for n in value.shape], True)  # type: ignore[attr-defined]
        note(moved).points = vocab if not value.dtype.is_floating_point else None
        return moved
    if isinstance(value, Mapping):
        return {key: _noted(item, vocab) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(partial(_noted, vocab=vocab), value))
    return copy.copy(value)


def _close(output: Any, vocab: Axis | None) -> None:  # noqa: ANN401 - whatever a forward gives
    """Marks outputs: logits are over the vocabulary or over labels, the rest is output."""
    fields = dict(output.items()) if isinstance(output, Mapping) else {}
    answers = {key: x for key, x in fields.items() if "logits" in str(key) and isinstance(x, Tensor) and x.dim()}
    for logits in answers.values():
        apply_pending(note(logits))
        *positions, last = note(logits).axes
        mark_units(positions, "output", "the positions of what the model answers")
        if vocab is not None and last.size == vocab.size:
            join(last, vocab)
        else:
            mark_units([last], "label", "what the model answers")
    if isinstance(output, ModelOutput) and {"logits", "prediction_logits"} & answers.keys():
        return  # the other fields are states and caches
    for tensor in tensors([x for key, x in fields.items() if key not in answers] if fields else output):
        apply_pending(note(tensor))
        mark_units(note(tensor).axes, "output", "the model's output has it, so that whatever reads the output must follow")
