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

from billhook.engine import BlockStore, evaluating_without_grad, full_precision, seeded, store_of
from billhook.model import load_as, load_streamed, make_inputs, match_implementations, text_config

Probe = Mapping[str, Any]
TIMES = 4
TRIALS = 4
"""Allowed difference, as a multiple of the effect of every weight's last digit, and number of trials.

Sums in another order have up to once that effect.
"""
MOST = 0.05
"""Upper bound of rounding, relative to the largest logit.

If a last digit changes a discrete choice of the model, its effect is not a measure of rounding.
"""
CACHE_LINE = 64  # bytes


def verify(
    model: PreTrainedModel, expected: Tensor, folder: Path, probe: Probe, kind: type[PreTrainedModel] | None = None
) -> float:
    """Reloads a folder and returns the largest difference from the model's logits.

    The folder is loaded one block at a time. For a model in memory, it is loaded completely if the logits differ or that fails,
    to distinguish rounding from wrong weights.

    Raises:
        RuntimeError: If the difference is larger than rounding explains.
    """
    kind = kind or type(model)
    streams = not store_of(model).holds_all
    if not streams and _matches_blockwise(model, expected, folder, probe, kind):
        return 0.0
    if streams:
        reloaded = load_streamed(kind, str(folder), model.dtype, share_with=model)
    else:
        try:
            reloaded = load_as(kind, str(folder), model.dtype).to(cast(Any, model.device))
        except ValueError as error:
            raise RuntimeError(f"the model was not saved, because its checkpoint is incomplete or broken: {error}") from error
    _match_computation(model, reloaded)
    logits = logits_of(reloaded, probe)
    if logits.shape != expected.shape:
        shapes = f"shape {list(logits.shape)} instead of {list(expected.shape)}"
        raise RuntimeError(f"the model was not saved, because the reloaded checkpoint has different logits: {shapes}")
    same = _equal(expected, logits)
    if same.all():
        return 0.0
    difference = float((expected - logits)[~same].abs().nan_to_num(torch.inf).max())
    if not difference <= _rounding(reloaded, logits, probe):
        raise RuntimeError(f"the model was not saved, because the logits of the reloaded checkpoint differ by {difference:.3g}")
    return difference


def _matches_blockwise(model: PreTrainedModel, expected: Tensor, folder: Path, probe: Probe, kind: type[PreTrainedModel]) -> bool:
    """Returns True if the folder, loaded block by block, has bitwise identical logits."""
    try:
        reloaded = load_streamed(kind, str(folder), model.dtype, share_with=model)
        _match_computation(model, reloaded)
        logits = logits_of(reloaded, probe)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # quantized models cannot be streamed, and a broken folder raises again when it is loaded completely
        return False
    return logits.shape == expected.shape and bool(_equal(expected, logits).all())


def _equal(logits: Tensor, other: Tensor) -> Tensor:
    return torch.isclose(logits, other, rtol=0, atol=0, equal_nan=True)


def expect(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Returns the logits that the reloaded checkpoint must have.

    Raises:
        ValueError: If the model does not run with the probe.
        RuntimeError: If no logit is finite.
    """
    try:
        expected = logits_of(model, probe)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises
        raise ValueError(
            f"probe: {type(model).__name__} does not run with {', '.join(probe)}, so it cannot be verified. Pass inputs with "
            f"which it runs ({type(error).__name__}: {error})"
        ) from error
    if not expected.isfinite().any():
        raise RuntimeError("the model was not saved, because it has no finite logits (its training has diverged)")
    return expected


def logits_of(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Returns the logits in float32, or the first output of a base model, with a fixed seed."""
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in probe.items()}
    with full_precision(), evaluating_without_grad(model), seeded(0, model.device):
        output = model(**inputs)
    logits: Tensor | tuple[Tensor, ...] = output.logits if hasattr(output, "logits") else output[0]
    has_several = isinstance(logits, tuple | list)  # MGP-STR has one output for characters and others for subwords
    return torch.cat([part.flatten() for part in logits]).float() if has_several else cast(Tensor, logits).float()


def make_probe(model: PreTrainedModel) -> dict[str, Any]:
    """Returns random inputs for a model, with up to 32 token ids.

    Raises:
        ValueError: If the inputs cannot be guessed.
    """
    text = text_config(model.config)
    positions = getattr(text, "max_position_embeddings", None)
    length = min(32, positions // 2) if isinstance(positions, int) and positions > 1 else 32
    try:  # some classifiers accept a single row, and music models need a row per codebook
        inputs = make_inputs(model, getattr(model.config, "num_codebooks", None) or 1, length)
    except ValueError as error:
        raise ValueError(f"probe=None: {str(error).partition('. ')[0]}. Pass a batch of inputs as probe.") from error
    end = getattr(text, "eos_token_id", None)
    size = getattr(text, "vocab_size", None) or 0
    for name in {"input_ids", "decoder_input_ids"} & inputs.keys():
        if isinstance(end, int) and 0 <= end < size:
            inputs[name][:, -1] = end  # some classifiers use its hidden state
    if {"input_ids", "decoder_input_ids"} <= inputs.keys() and text is model.config:
        inputs["decoder_input_ids"] = inputs["input_ids"]  # some models search one for tokens of the other
    return inputs


def _match_computation(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Gives a reloaded model the implementations, devices, and memory alignment of the model."""
    match_implementations(model, reloaded)
    originals = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    _match_memory(originals, reloaded)
    store = store_of(reloaded)
    for name, block in store.blocks.items():
        block.register_forward_pre_hook(partial(_load_block, store, originals, name))


def _load_block(store: BlockStore, originals: Mapping[str, Tensor], name: str, block: nn.Module, *_: object) -> None:
    store.load(block)
    _match_memory(originals, block, name)


def _match_memory(originals: Mapping[str, Tensor], part: nn.Module, prefix: str = "") -> None:
    """Moves tensors to the originals' devices and cache-line offsets, which affect sums."""
    for name, tensor in itertools.chain(part.named_parameters(prefix), part.named_buffers(prefix)):
        original = originals.get(name)
        if original is None or tensor.is_meta or original.is_meta:
            continue
        tensor.data = tensor.detach().to(original.device)
        start = (original.data_ptr() - tensor.data_ptr()) % CACHE_LINE
        if tensor.device.type == "cpu" and start:
            memory = torch.empty(tensor.nbytes + CACHE_LINE, dtype=torch.uint8)
            start = (original.data_ptr() - memory.data_ptr()) % CACHE_LINE
            tensor.data = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _rounding(reloaded: PreTrainedModel, logits: Tensor, probe: Probe) -> float:
    """Returns the largest logit difference that changes of last digits explain."""
    store = store_of(reloaded)
    generator = torch.Generator().manual_seed(0)
    effect = 0.0
    before = logits
    with torch.no_grad(), ExitStack() as stack:
        for trial in range(TRIALS):  # several trials, because a few logits may be unchanged by chance
            # the blocks of a streamed model are changed whenever they are loaded, in the same way each time
            stack.enter_context(store.altered(partial(_change_block, store, trial)))
            _change_last_digits((weight for weight in reloaded.parameters() if not weight.is_meta), generator)
            after = logits_of(reloaded, probe)
            effect = max(effect, (after - before).abs().nan_to_num(0.0).max().item())
            before = after
    finite = logits[logits.isfinite()].abs()
    largest = finite.max().item() if len(finite) else 0.0
    return max(min(TIMES * effect, MOST * largest), torch.finfo(reloaded.dtype).eps * largest)


def _change_block(store: BlockStore, trial: int, block: nn.Module) -> list[nn.Parameter]:
    number = list(store.blocks.values()).index(block)
    weights = list(block.parameters())
    _change_last_digits(weights, torch.Generator().manual_seed(trial + TRIALS * (1 + number)))
    return weights


def _change_last_digits(weights: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    for weight in weights:
        if weight.is_floating_point():
            digits = torch.finfo(weight.dtype).eps * (2 * torch.randint(2, weight.shape, generator=generator) - 1)
            weight.data = weight * (1 + digits).to(weight)  # not in place, because tensors may share the old values
