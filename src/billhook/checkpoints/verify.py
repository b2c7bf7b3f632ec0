"""Verifies a saved checkpoint: reloads it and compares logits."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.state import evaluating_without_grad, full_precision, seeded
from billhook.engine.store import BlockStore, store_of
from billhook.model.config_fields import text_config
from billhook.model.inputs import make_inputs
from billhook.model.shaped import load_as
from billhook.model.streamed import load_streamed
from billhook.model.transformers_internals import match_implementations

Probe = Mapping[str, Any]
TIMES, TRIALS = 4, 4
"""How often the effect of every weight's last digit counts as rounding; sums in another order have up to once that effect."""
MOST = 0.05
"""What rounding is at most, relative to the largest logit: where a last digit turns a choice, its effect is no measure."""
CACHE_LINE = 64  # bytes


def verify(
    model: PreTrainedModel, expected: Tensor, folder: Path, probe: Probe, kind: type[PreTrainedModel] | None = None
) -> float:
    """Reloads a folder in a class, by default the model's, and returns the largest difference from the model's logits.

    It is read one block at a time. Only if that gives other logits, or cannot be done, is it loaded as a whole beside a model in
    memory, to tell rounding from other weights.

    Raises:
        RuntimeError: If the difference is more than rounding explains.
    """
    kind, streams = kind or type(model), not store_of(model).holds_all
    if not streams and _is_same_by_blocks(model, expected, folder, probe, kind):
        return 0.0
    if streams:
        reloaded = load_streamed(kind, str(folder), model.dtype, share_with=model)
    else:
        try:
            reloaded = load_as(kind, str(folder), model.dtype).to(cast(Any, model.device))
        except ValueError as error:
            raise RuntimeError(f"the reloaded checkpoint is incomplete or broken, so it was not saved: {error}") from error
    _make_alike(model, reloaded)
    logits = logits_of(reloaded, probe)
    if logits.shape != expected.shape:
        sizes = f"they are {list(logits.shape)}, and were {list(expected.shape)}"
        raise RuntimeError(f"the reloaded checkpoint computes other logits: {sizes}; it was not saved")
    same = _where_same(expected, logits)
    if same.all():
        return 0.0
    difference = float((expected - logits)[~same].abs().nan_to_num(torch.inf).max())
    if not difference <= _rounding(reloaded, logits, probe):
        raise RuntimeError(f"the reloaded checkpoint computes other logits: they differ by {difference:.3g}; it was not saved")
    return difference


def _is_same_by_blocks(model: PreTrainedModel, expected: Tensor, folder: Path, probe: Probe, kind: type[PreTrainedModel]) -> bool:
    """Tells whether a folder that is read one block at a time gives the same logits, bit for bit."""
    try:
        reloaded = load_streamed(kind, str(folder), model.dtype, share_with=model)
        _make_alike(model, reloaded)
        logits = logits_of(reloaded, probe)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # what is quantised cannot be streamed, and what is broken says so again when it is loaded as a whole
        return False
    return logits.shape == expected.shape and bool(_where_same(expected, logits).all())


def _where_same(logits: Tensor, other: Tensor) -> Tensor:
    return torch.isclose(logits, other, rtol=0, atol=0, equal_nan=True)


def expect(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Computes the logits that the reloaded checkpoint must give.

    Raises:
        ValueError: If the model does not run with the probe.
        RuntimeError: If it computes no finite number.
    """
    try:
        expected = logits_of(model, probe)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises
        raise ValueError(
            f"probe: {type(model).__name__} does not run with {', '.join(probe)}, so that nothing can be verified: give inputs "
            f"with which it runs ({type(error).__name__}: {error})"
        ) from error
    if not expected.isfinite().any():
        raise RuntimeError("the model computes no finite logits, so nothing can be verified (it has diverged); it was not saved")
    return expected


def logits_of(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Computes the logits in float32, or for a model without a head its first output; some draw random numbers, the same."""
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in probe.items()}
    with full_precision(), evaluating_without_grad(model), seeded(0, model.device):
        output = model(**inputs)
    logits: Tensor | tuple[Tensor, ...] = output.logits if hasattr(output, "logits") else output[0]
    several = isinstance(logits, tuple | list)  # of heads for characters and for pieces of words, as MGP-STR's
    return torch.cat([part.flatten() for part in logits]).float() if several else cast(Tensor, logits).float()


def make_probe(model: PreTrainedModel) -> dict[str, Any]:
    """Makes random inputs of the kinds that a model reads; token ids are 32 that end as a sequence does.

    Raises:
        ValueError: If they cannot be guessed.
    """
    text = text_config(model.config)
    positions = getattr(text, "max_position_embeddings", None)
    length = min(32, positions // 2) if isinstance(positions, int) and positions > 1 else 32
    try:  # some classifiers take one row, and music comes in a row for each codebook
        inputs = make_inputs(model, getattr(model.config, "num_codebooks", None) or 1, length)
    except ValueError as error:
        raise ValueError(f"probe: {str(error).partition(':')[0]}: a batch of them is needed to verify with") from error
    end, size = getattr(text, "eos_token_id", None), getattr(text, "vocab_size", None) or 0
    for name in {"input_ids", "decoder_input_ids"} & inputs.keys():
        if isinstance(end, int) and 0 <= end < size:
            inputs[name][:, -1] = end  # some classifiers read there
    if {"input_ids", "decoder_input_ids"} <= inputs.keys() and text is model.config:
        inputs["decoder_input_ids"] = inputs["input_ids"]  # which they look for in the other
    return inputs


def _make_alike(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Has a reloaded model compute as the model does, and its tensors lie where the model's do, blocks when they come."""
    match_implementations(model, reloaded)
    there = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    _lie_alike(there, reloaded)
    store = store_of(reloaded)
    for name, block in store.blocks.items():
        block.register_forward_pre_hook(partial(_arrive, store, there, name))


def _arrive(store: BlockStore, there: Mapping[str, Tensor], name: str, block: nn.Module, *_: object) -> None:
    store.load(block)
    _lie_alike(there, block, name)


def _lie_alike(there: Mapping[str, Tensor], part: nn.Module, prefix: str = "") -> None:
    """Has tensors lie on the devices, and in cache lines, as others of the same names do.

    Those read from a file begin anywhere, and sums differ by it.
    """
    for name, tensor in itertools.chain(part.named_parameters(prefix), part.named_buffers(prefix)):
        other = there.get(name)
        if other is None or tensor.is_meta or other.is_meta:
            continue
        tensor.data = tensor.detach().to(other.device)
        start = (other.data_ptr() - tensor.data_ptr()) % CACHE_LINE
        if tensor.device.type == "cpu" and start:
            room = torch.empty(tensor.nbytes + CACHE_LINE, dtype=torch.uint8)
            start = (other.data_ptr() - room.data_ptr()) % CACHE_LINE
            tensor.data = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _rounding(reloaded: PreTrainedModel, logits: Tensor, probe: Probe) -> float:
    """Returns how far logits may be apart: `TIMES` the largest effect, in some trials, of every weight's last digit.

    Of a model that is streamed, blocks are changed whenever they come, each time alike.
    """
    store, generator, effect, before = store_of(reloaded), torch.Generator().manual_seed(0), 0.0, logits
    with torch.no_grad(), ExitStack() as stack:
        for trial in range(TRIALS):  # several, as by chance a few logits may stay as they are
            stack.enter_context(store.altered(partial(_change_block, store, trial)))
            _change_last_digits((weight for weight in reloaded.parameters() if not weight.is_meta), generator)
            after = logits_of(reloaded, probe)
            effect, before = max(effect, (after - before).abs().nan_to_num(0.0).max().item()), after
    finite = logits[logits.isfinite()].abs()
    largest = finite.max().item() if len(finite) else 0.0
    least = torch.finfo(reloaded.dtype).eps * largest
    return max(min(TIMES * effect, MOST * largest), least)


def _change_block(store: BlockStore, trial: int, block: nn.Module) -> list[nn.Parameter]:
    number, weights = list(store.blocks.values()).index(block), list(block.parameters())
    _change_last_digits(weights, torch.Generator().manual_seed(trial + TRIALS * (1 + number)))
    return weights


def _change_last_digits(weights: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    for weight in weights:
        if weight.is_floating_point():
            digits = torch.finfo(weight.dtype).eps * (2 * torch.randint(2, weight.shape, generator=generator) - 1)
            weight.data = weight * (1 + digits).to(weight)  # others may share the old values
