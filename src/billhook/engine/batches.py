"""Batches: what a model is called with, which of the tokens count, and the loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from billhook.engine.parts import fingerprint
from billhook.engine.trees import tree_leaves, tree_map_only
from billhook.progress import OnProgress

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
    return [batch if isinstance(batch, Run) else _run(model, batch) for batch in check_batches(batches)]


def runs_fingerprint(runs: Iterable[Run]) -> str:
    """Returns a hash of what a model is given in runs; another one each time if that is not known of one of them."""
    return fingerprint([(run.source, uuid4() if run.batch is None else run.batch, run.tokens) for run in runs])


def with_progress(runs: Sequence[Run], report: OnProgress) -> list[Run]:
    """Returns runs that tell how many of them have been visited, and how many there are."""
    seen = set[int]()

    def after(number: int, forward: Callable[[], Any]) -> Callable[[], Any]:
        def visited() -> Any:  # noqa: ANN401 - whatever the forward returns
            output = forward()
            seen.add(number)
            report(len(seen), len(runs))
            return output

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


def check_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Returns batches; refuses one that is given in the place of several."""
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches={type(batches).__name__} is one batch: give a list of them")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches={batches!r} must be a collection of batches")
    return batches


def _check_filled(batch: Any) -> None:  # noqa: ANN401
    """Refuses a batch that holds nothing for a model."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if (isinstance(batch, dict | list | tuple) and not batch) or (tensors and not any(leaf.numel() for leaf in tensors)):
        raise ValueError(f"batches: a batch is empty: {', '.join(str(list(leaf.shape)) for leaf in tensors) or batch!r}")


def _run(model: nn.Module, batch: Any) -> Run:  # noqa: ANN401
    source, batch = source_of(batch), _on_device(model, batch)
    _check_filled(batch)
    if not isinstance(batch, dict):
        return Run(_forward(model, batch), batch=batch)
    config = getattr(model, "config", None)
    masks = {"attention_mask": batch.get("attention_mask")}
    if getattr(config, "is_encoder_decoder", False):
        batch = _told_apart(batch, getattr(config, "max_position_embeddings", None))
        masks["decoder_attention_mask"] = _decoder_mask(batch)
    elif config is not None:
        batch.pop("labels", None)  # no loss is asked for
    tokens = {name: mask.bool() for name, mask in masks.items() if _is_mask(mask)}
    padded = {name: mask for name, mask in tokens.items() if not mask.all()}
    return Run(_forward(model, batch), padded, source=source, batch=batch)


def run_with_loss(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Makes a run of a batch whose forward returns the loss, on the model's device; `modules` need to know which tokens count."""
    source, batch = source_of(batch), _on_device(model, batch)
    run, tokens = partial(loss or model_loss, model), tokens_of(model, modules, batch)

    def examples() -> list[Callable[[], Tensor]]:
        return [partial(run, example) for example in examples_of(batch)]

    if loss is not None:
        return Run(partial(run, batch), tokens, examples, source=source)
    _check_filled(batch)
    return Run(partial(run, batch), tokens, examples, lambda: _forward(model, batch)(), source, batch)


def examples_of(batch: Any) -> list[Any]:  # noqa: ANN401
    """Takes a batch apart into examples: slices along the first dimension; what has one entry there, as positions may, stays."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
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


def model_loss(model: nn.Module, batch: Any, hint: str = ", or give `loss`") -> Tensor:  # noqa: ANN401
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
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"batches: {type(model).__name__} gives no loss for {', '.join(batch)}: add labels{hint}")
    return loss


def _forward(model: nn.Module, batch: Any) -> Callable[[], Any]:  # noqa: ANN401
    """Returns a forward of a model on a batch."""
    if isinstance(batch, dict):
        return partial(model, **batch)
    if isinstance(batch, list | tuple):
        return partial(model, *batch)
    if isinstance(batch, Tensor):
        return partial(model, batch)
    raise ValueError(f"batches: a {type(batch).__name__} is no dictionary, tuple or tensor of what the model takes")


def tokens_of(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Finds the tokens that count for each module, where a batch says so: bool, `[batch, length]`."""
    if not isinstance(batch, Mapping):
        return {}
    decoder: Any = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", lambda: None)()
    in_decoder = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    masks = (batch.get("attention_mask"), _decoder_mask(batch))
    read, written = (mask.bool() if _is_mask(mask) else None for mask in masks)  # modules with the same tokens share one tensor
    tokens = dict[str, Tensor]()
    for name, module in modules.items():
        mask = written if module in in_decoder else read
        if mask is not None:
            tokens[name] = mask
    return tokens


def check_one_device(model: nn.Module) -> None:
    """Refuses a model that accelerate has spread over devices, whose sums could not be added up, or whose weights it moves.

    Where a visitor ends a forward early, accelerate would leave the weights that it has brought.
    """
    for module in model.modules():
        devices = {str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(devices) > 1 or "disk" in devices:
            raise ValueError(
                f"model: its device_map has spread it over {', '.join(sorted(devices))}, and here it must be on one device: "
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
    inputs = {key: batch[key] for key in ("decoder_input_ids", "labels") if isinstance(batch.get(key), Tensor)}
    if not inputs or not isinstance(mask, Tensor) or mask.shape != next(iter(inputs.values())).shape:
        return batch
    counts = batch.get("decoder_attention_mask")
    if counts is None:
        counts = (batch["labels"] != -100).long() if "labels" in inputs else torch.ones_like(mask)
    if mask.all() and counts.all():
        return batch
    more = -1 if longest is not None and mask.shape[1] >= longest else 1
    inputs["decoder_attention_mask"] = counts
    return batch | {key: pad(value, (0, more), value=-100 if key == "labels" else 0) for key, value in inputs.items()}


def _decoder_mask(batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Finds the tokens of a decoder that count; without a mask, those with labels."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return labels != -100 if mask is None and isinstance(labels, Tensor) else mask


def _is_mask(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2
