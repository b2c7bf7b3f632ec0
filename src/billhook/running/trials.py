"""One batch with its loss, as importances and repairs run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Trial:
    """One batch: its loss, that of each example alone, and which tokens count.

    Attributes:
        loss: Runs the model and gives the loss, a number with a gradient.
        tokens: For the readers of which there is padding: which of the tokens that they read count, bool, `[batch, length]`.
        examples: Gives the losses of the examples; raises ValueError where the batch cannot be taken apart.
    """

    loss: Callable[[], Tensor]
    tokens: Mapping[str, Tensor]
    examples: Callable[[], list[Callable[[], Tensor]]]


def trial_for(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any, loss: Loss | None = None) -> Trial:  # noqa: ANN401
    """The same, with the tokens that count for some modules."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    run = partial(loss or own_loss, model)
    return Trial(partial(run, batch), tokens_of(model, modules, batch), lambda: [partial(run, one) for one in examples_of(batch)])


def examples_of(batch: Any) -> list[Any]:  # noqa: ANN401
    """The examples of a batch, each a batch of one: slices of its tensors along their first dimension.

    A tensor that has one entry there, as positions may, goes with each of them.

    Raises:
        ValueError: If its tensors do not agree on how many there are.
    """
    shapes = [tuple(one.shape) for one in tree_leaves(batch) if isinstance(one, Tensor)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    count = max(counts, default=0)
    if not count or counts - {1, count}:
        raise ValueError(
            "batches: a batch with tensors of shapes "
            f"{', '.join(map(str, shapes)) or 'none'} cannot be taken apart into its examples along the first dimension, which "
            "order='second' and 'mixed' need"
        )

    def take(number: int, tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == 1 else tensor[number : number + 1]

    return [tree_map_only(Tensor, partial(take, number), batch) for number in range(count)]


def own_loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """The loss that a model gives; a causal language model predicts its inputs, where there are no labels.

    Raises:
        ValueError: If it gives none.
    """
    if not isinstance(batch, dict):
        raise ValueError(
            f"batches: a {type(batch).__name__} is no dictionary of what the model takes: give `loss` to make use of it"
        )
    config: Any = getattr(model, "config", None)
    writes = getattr(model, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if "labels" not in batch and writes and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None:  # neither is padding predicted, nor does it predict
            ids = ids.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), -100)
        batch = batch | {"labels": ids}
    found: Tensor | None = getattr(model(**batch), "loss", None)
    if found is None:
        raise ValueError(f"batches: {type(model).__name__} gives no loss for {', '.join(batch)}: add labels, or give `loss`")
    return found


def tokens_of(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """For each of some modules, which of the tokens that it reads count, where a batch says so: bool, `[batch, length]`."""
    if not isinstance(batch, Mapping):
        return {}
    mask, later = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    if later is None and isinstance(batch.get("labels"), Tensor):
        later = batch["labels"] != -100
    decoder: Any = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    first, second = (one.bool() if isinstance(one, Tensor) and one.dim() == 2 else None for one in (mask, later))
    masks = {name: second if module in inside else first for name, module in modules.items()}
    return {name: one for name, one in masks.items() if one is not None}
