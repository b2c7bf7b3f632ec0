"""Calibration batches: what the model is called with, and which of their tokens count."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True, eq=False)
class Run:
    """One forward of a model.

    Attributes:
        forward: The forward.
        tokens: Which tokens count, bool, `[batch, length]`: one for each of its sequences that has padding.
    """

    forward: Callable[[], object]
    tokens: tuple[Tensor, ...] = ()


def runs_of(model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """One run a batch, on the model's device.

    Args:
        model: What is called.
        batches: Each is a dictionary, a tuple or list, or one tensor; or a run already.

    Raises:
        ValueError: If a batch is none of these, or the batches are no collection.
    """
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches={type(batches).__name__} is one batch: give a list of them")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches={batches!r} must be a collection of batches")
    return [batch if isinstance(batch, Run) else _run(model, batch, number) for number, batch in enumerate(batches)]


def _run(model: nn.Module, batch: Any, number: int) -> Run:  # noqa: ANN401
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = tree_map_only(Tensor, lambda x: x.to(device), dict(batch) if isinstance(batch, Mapping) else batch)
    if isinstance(batch, Tensor):
        return Run(partial(model, batch))
    if isinstance(batch, list | tuple):
        return Run(partial(model, *batch))
    if not isinstance(batch, dict):
        raise ValueError(f"batches: batch {number} is a {type(batch).__name__}, not a dictionary, a tuple or a tensor")
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        if config is not None:
            batch.pop("labels", None)  # no loss is asked for
        return Run(partial(model, **batch), _padded(batch.get("attention_mask")))
    batch = _told_apart(batch, getattr(config, "max_position_embeddings", None))
    decoded = batch.get("decoder_attention_mask")
    if decoded is None and isinstance(batch.get("labels"), Tensor):
        decoded = batch["labels"] != -100
    return Run(partial(model, **batch), _padded(batch.get("attention_mask")) + _padded(decoded))


def _told_apart(batch: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """Tokens of encoder and decoder are told apart by length: where it is the same, the decoder gets one that does not count.

    A decoder that is as long as it can be loses its last one instead.
    """
    mask = batch.get("attention_mask")
    given = {key: batch[key] for key in ("decoder_input_ids", "labels") if isinstance(batch.get(key), Tensor)}
    if not given or not isinstance(mask, Tensor) or mask.shape != next(iter(given.values())).shape:
        return batch
    counts = batch.get("decoder_attention_mask")
    if counts is None:
        counts = (batch["labels"] != -100).long() if "labels" in given else torch.ones_like(mask)
    if mask.all() and counts.all():
        return batch
    more = -1 if longest is not None and mask.shape[1] >= longest else 1
    given["decoder_attention_mask"] = counts
    return batch | {key: pad(value, (0, more), value=-100 if key == "labels" else 0) for key, value in given.items()}


def _padded(mask: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return ()
    keep = mask.bool()
    return () if keep.all() else (keep,)
