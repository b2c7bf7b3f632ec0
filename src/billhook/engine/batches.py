"""Batches: what a model is called with, which of the tokens count, and the loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from billhook.bar import Told
from billhook.engine.parts import fingerprint
from billhook.engine.trees import tree_leaves, tree_map_only

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """A model run on one batch.

    Attributes:
        forward: Runs the model; returns the loss, a number with a gradient, where `run_with_loss` made the run.
        tokens: Which tokens count, bool, `[batch, length]`, where there is padding: by the name of the module that reads them,
            or by that of the mask, which then holds for all that is of its shape.
        examples: Returns a forward for each example alone; raises ValueError if the batch cannot be taken apart.
        lossless: Runs the model also where it gives no loss; None if `forward` does.
        source: The name of the source that the batch is of.
        batch: What the model is given, which tells runs apart; None where a loss or a step of others runs it.
    """

    forward: Callable[[], Any]
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Callable[[], list[Callable[[], Tensor]]] = list
    lossless: Callable[[], Any] | None = None
    source: str = ""
    batch: Any = None

    def visit(self) -> Any:  # noqa: ANN401 - whatever a model returns
        """Runs the model for what it computes inside, with a loss or without one."""
        return (self.lossless or self.forward)()


class Batch(dict[str, Any]):
    """Inputs of a model's forward, with the name of the source that they are of."""

    def __init__(self, inputs: Mapping[str, Any], source: str = "") -> None:
        super().__init__(inputs)
        self.source = source


def source_of(batch: Any) -> str:  # noqa: ANN401
    """Returns the name of a batch's source, if it has one."""
    return batch.source if isinstance(batch, Batch | Run) else ""


def runs_of(model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """Makes a run, on the model's device and without a loss, of each batch: a dictionary, a tuple, a list, a tensor, or a run."""
    return [batch if isinstance(batch, Run) else _run(model, batch, number) for number, batch in enumerate(each(batches))]


def tell_apart(runs: Iterable[Run]) -> str:
    """Returns a hash of what a model is given in runs; another one each time if that is not known of one of them."""
    return fingerprint([(run.source, uuid4() if run.batch is None else run.batch, run.tokens) for run in runs])


def telling(runs: Sequence[Run], told: Told) -> list[Run]:
    """Returns runs that tell how many of them have been visited, and how many there are."""
    seen = set[int]()

    def after(number: int, forward: Callable[[], Any]) -> Callable[[], Any]:
        def visited() -> Any:  # noqa: ANN401 - whatever the forward returns
            found = forward()
            seen.add(number)
            told(len(seen), len(runs))
            return found

        return visited

    return [
        replace(
            run,
            forward=after(number, run.forward),
            examples=after(number, run.examples),
            lossless=None if run.lossless is None else after(number, run.lossless),
        )
        for number, run in enumerate(runs)
    ]


def each(batches: Iterable[Any]) -> Iterable[Any]:
    """Returns batches; refuses one that is given in the place of several."""
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches={type(batches).__name__} is one batch: give a list of them")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches={batches!r} must be a collection of batches")
    return batches


def _check_filled(batch: Any) -> None:  # noqa: ANN401
    """Refuses a batch that holds nothing for a model."""
    held = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if (isinstance(batch, dict | list | tuple) and not batch) or (held and not any(leaf.numel() for leaf in held)):
        raise ValueError(f"batches: a batch is empty: {', '.join(str(list(leaf.shape)) for leaf in held) or batch!r}")


def _run(model: nn.Module, batch: Any, number: int) -> Run:  # noqa: ANN401
    source, batch = source_of(batch), _on_device(model, batch)
    _check_filled(batch)
    if isinstance(batch, Tensor):
        return Run(partial(model, batch), batch=batch)
    if isinstance(batch, list | tuple):
        return Run(partial(model, *batch), batch=batch)
    if not isinstance(batch, dict):
        raise ValueError(f"batches: batch {number} is a {type(batch).__name__}, not a dictionary, a tuple or a tensor")
    config = getattr(model, "config", None)
    masks = {"attention_mask": batch.get("attention_mask")}
    if getattr(config, "is_encoder_decoder", False):
        batch = _told_apart(batch, getattr(config, "max_position_embeddings", None))
        masks["decoder_attention_mask"] = _decoder_mask(batch)
    elif config is not None:
        batch.pop("labels", None)  # no loss is asked for
    tokens = {name: mask.bool() for name, mask in masks.items() if _is_mask(mask)}
    padded = {name: mask for name, mask in tokens.items() if not mask.all()}
    return Run(partial(model, **batch), padded, source=source, batch=batch)


def run_with_loss(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Makes a run of a batch whose forward returns the loss, on the model's device; `modules` need to know which tokens count."""
    source, batch = source_of(batch), _on_device(model, batch)
    if loss is None:
        _check_filled(batch)
    run, tokens = partial(loss or own_loss, model), tokens_of(model, modules, batch)
    lossless = None if loss is not None else partial(_output, model, batch)
    known = batch if loss is None else None
    return Run(partial(run, batch), tokens, lambda: [partial(run, one) for one in examples_of(batch)], lossless, source, known)


def examples_of(batch: Any) -> list[Any]:  # noqa: ANN401
    """Takes a batch apart into examples: slices along the first dimension; what has one entry there, as positions may, stays."""
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


def own_loss(model: nn.Module, batch: Any, hint: str = ", or give `loss`") -> Tensor:  # noqa: ANN401
    """Returns the loss that a model gives; a causal language model predicts its inputs if there are no labels."""
    if not isinstance(batch, dict):
        raise ValueError(f"batches: a {type(batch).__name__} is no dictionary of what the model takes{hint}")
    config: Any = getattr(model, "config", None)
    writes = getattr(model, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if "labels" not in batch and writes and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None:  # neither is padding predicted, nor does it predict
            ids = ids.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), -100)
        batch = batch | {"labels": ids}
    found: Tensor | None = getattr(model(**batch), "loss", None)
    if found is None:
        raise ValueError(f"batches: {type(model).__name__} gives no loss for {', '.join(batch)}: add labels{hint}")
    return found


def _output(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """Returns what a model makes of a batch."""
    if isinstance(batch, list | tuple):
        return model(*batch)
    if not isinstance(batch, dict | Tensor):
        raise ValueError(f"batches: a {type(batch).__name__} is no dictionary, tuple or tensor of what the model takes")
    return model(**batch) if isinstance(batch, dict) else model(batch)


def tokens_of(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Finds the tokens that count for each module, where a batch says so: bool, `[batch, length]`."""
    if not isinstance(batch, Mapping):
        return {}
    decoder: Any = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    pair = (batch.get("attention_mask"), _decoder_mask(batch))
    first, second = (mask.bool() if _is_mask(mask) else None for mask in pair)  # modules with the same tokens share one tensor
    masks = {name: second if module in inside else first for name, module in modules.items()}
    return {name: one for name, one in masks.items() if one is not None}


def check_one_device(model: nn.Module) -> None:
    """Refuses a model that accelerate has spread over devices, whose sums could not be added up, or whose weights it moves.

    Where a visitor ends a forward early, accelerate would leave the weights that it has brought.
    """
    for module in model.modules():
        places = {str(place) for place in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(places) > 1 or "disk" in places:
            raise ValueError(
                f"model: its device_map has spread it over {', '.join(sorted(places))}, and here it must be on one device: "
                "load it without device_map or, if it is too large, stream it (bh.stream)"
            )


def _on_device(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    check_one_device(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def _told_apart(batch: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """Makes the decoder's tokens one more than the encoder's if they are as many, as masks are told apart by their length.

    The new one does not count. A decoder that is as long as it can be loses its last one instead.
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


def _decoder_mask(batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Finds the tokens of a decoder that count; without a mask, those with labels."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return labels != -100 if mask is None and isinstance(labels, Tensor) else mask


def _is_mask(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2
