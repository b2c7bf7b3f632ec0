"""Batches and runs: model inputs, their non-padding tokens, and the loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeGuard
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from billhook.engine.parts import fingerprint
from billhook.engine.trees import ModulesByName, tree_leaves, tree_map_only
from billhook.progress import OnProgress

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """A model run on a batch.

    Attributes:
        forward: Runs the model. Returns the loss if `run_with_loss` made the run.
        tokens: Non-padding tokens, bool, `[batch, length]`, by the name of the module that uses them. A mask's name stands for
            all inputs of its shape. Empty without padding.
        examples: Returns a forward for each example. Raises ValueError if the batch cannot be split.
        lossless: Runs the model without a loss. None if `forward` does.
        source: The name of the batch's source.
        batch: The model's inputs, which identify the run. None if they are unknown.
    """

    forward: Callable[[], Any]
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Callable[[], list[Callable[[], Tensor]]] = list
    lossless: Callable[[], Any] | None = None
    source: str = ""
    batch: Any = None

    def visit(self) -> Any:  # noqa: ANN401 - whatever a model returns
        """Runs the model for its activations, with or without a loss."""
        return (self.lossless or self.forward)()


class Batch(dict[str, Any]):
    """Inputs of a forward, with the name of their source."""

    def __init__(self, inputs: Mapping[str, Any], source: str = "") -> None:
        super().__init__(inputs)
        self.source = source


def source_of(batch: Any) -> str:  # noqa: ANN401
    """Returns the name of a batch's source, or an empty string."""
    return batch.source if isinstance(batch, Batch | Run) else ""


def inputs_of(batch: Any) -> Any:  # noqa: ANN401
    """Returns the model's inputs of a batch, or of a run of it."""
    return batch.batch if isinstance(batch, Run) else batch


class Outputs(NamedTuple):
    """A model's outputs at non-padding positions.

    Attributes:
        values: Logits, `[positions, classes]`, or token states, `[positions, hidden]`.
        is_logits: False for token states, which a model without logits has.
    """

    values: Tensor
    is_logits: bool


def token_outputs(run: Run) -> Outputs | None:
    """Runs a model, and returns its logits or token states; None if it has neither."""
    output = run.visit()
    for name in ("logits", "last_hidden_state"):
        values = getattr(output, name, None)
        if isinstance(values, Tensor):
            mask = run.tokens.get("decoder_attention_mask", run.tokens.get("attention_mask"))
            masked = mask is not None and mask.shape == values.shape[:-1]
            return Outputs(values[mask] if masked else values.flatten(0, -2), name == "logits")
    return None


def runs_of(model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """Makes a run of each batch, on the model's device and without a loss."""
    return [batch if isinstance(batch, Run) else _run(model, batch) for batch in check_batches(batches)]


def runs_fingerprint(runs: Iterable[Run]) -> str:
    """Returns a hash of the inputs of runs, which is unique if any inputs are unknown."""
    return fingerprint([(run.source, uuid4() if run.batch is None else run.batch, run.tokens) for run in runs])


def with_progress(runs: Sequence[Run], report: OnProgress) -> list[Run]:
    """Wraps runs so that they report the number of visited runs and the total."""
    seen = set()

    def visited(number: int, forward: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the forward returns
        output = forward()
        seen.add(number)
        report(len(seen), len(runs))
        return output

    return [
        replace(
            run,
            forward=partial(visited, number, run.forward),
            examples=partial(visited, number, run.examples),
            lossless=None if run.lossless is None else partial(visited, number, run.lossless),
        )
        for number, run in enumerate(runs)
    ]


def check_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Returns the batches. Raises if a single batch was passed."""
    if isinstance(batches, Mapping | Tensor):
        raise ValueError(f"batches is a single batch ({type(batches).__name__}). Pass a list of batches.")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches={batches!r} must be an iterable of batches.")
    return batches


def _check_filled(batch: Any) -> None:  # noqa: ANN401
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if (isinstance(batch, dict | list | tuple) and not batch) or (tensors and not any(map(Tensor.numel, tensors))):
        raise ValueError(f"batches contains an empty batch: {', '.join(str(list(leaf.shape)) for leaf in tensors) or batch!r}")


def _run(model: nn.Module, batch: Any) -> Run:  # noqa: ANN401
    source, batch = source_of(batch), _on_device(model, batch)
    _check_filled(batch)
    if not isinstance(batch, dict):
        return Run(_forward(model, batch), batch=batch)
    config = getattr(model, "config", None)
    masks = {"attention_mask": batch.get("attention_mask")}
    if getattr(config, "is_encoder_decoder", False):
        batch = _with_distinct_lengths(batch, getattr(config, "max_position_embeddings", None))
        masks["decoder_attention_mask"] = _decoder_mask(batch)
    elif config is not None:
        batch.pop("labels", None)  # no loss is computed
    tokens = {name: mask.bool() for name, mask in masks.items() if _is_mask(mask)}
    padded = {name: mask for name, mask in tokens.items() if not mask.all()}
    return Run(_forward(model, batch), padded, source=source, batch=batch)


def run_with_loss(model: nn.Module, modules: ModulesByName, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Makes a run whose forward returns the loss.

    Args:
        model: The model.
        modules: Modules that need their non-padding tokens, by name.
        batch: Inputs of the model, or of `loss`.
        loss: Function of model and batch. Defaults to the model's loss.
    """
    source, batch = source_of(batch), _on_device(model, batch)
    run, tokens = partial(loss or model_loss, model), token_masks(model, modules, batch)

    def examples() -> list[Callable[[], Tensor]]:
        return [partial(run, example) for example in examples_of(batch)]

    if loss is not None:
        return Run(partial(run, batch), tokens, examples, source=source)
    _check_filled(batch)
    return Run(partial(run, batch), tokens, examples, lambda: _forward(model, batch)(), source, batch)


def examples_of(batch: Any) -> list[Any]:  # noqa: ANN401
    """Splits a batch into examples along the first dimension; size 1 is shared.

    Raises:
        ValueError: If tensors differ in their first dimension.
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    counts = {(*shape, 0)[0] for shape in shapes}
    count = max(counts, default=0)
    if not count or counts - {1, count}:
        raise ValueError(
            f"batches: a batch with tensors of shapes {', '.join(map(str, shapes)) or 'none'} cannot be split into examples "
            "along the first dimension, which order='second' and 'mixed' require. Use order='first'."
        )

    def example(number: int) -> Any:  # noqa: ANN401
        return tree_map_only(Tensor, lambda tensor: tensor if len(tensor) == 1 else tensor[number : number + 1], batch)

    return list(map(example, range(count)))


def model_loss(model: nn.Module, batch: Any, hint: str = ", or pass loss=") -> Tensor:  # noqa: ANN401
    """Returns the loss of a model. Causal language models predict their inputs by default.

    Raises:
        ValueError: If the batch is not a dictionary, or the model returns no loss.
    """
    if not isinstance(batch, dict):
        raise ValueError(f"batches: a {type(batch).__name__} is not a dictionary of model inputs. Pass dictionaries{hint}.")
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if "labels" not in batch and generates and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None:  # padding is neither a target nor an input of a prediction
            ids = ids.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), -100)
        batch = batch | {"labels": ids}
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"batches: {type(model).__name__} returns no loss for inputs {', '.join(batch)}. Add labels{hint}.")
    return loss


def _forward(model: nn.Module, batch: Any) -> Callable[[], Any]:  # noqa: ANN401
    if isinstance(batch, dict):
        return partial(model, **batch)
    if isinstance(batch, list | tuple):
        return partial(model, *batch)
    if isinstance(batch, Tensor):
        return partial(model, batch)
    raise ValueError(f"batches: a {type(batch).__name__} is not a dictionary, tuple, list, or tensor of model inputs.")


def token_masks(model: nn.Module, modules: ModulesByName, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Finds the non-padding tokens of each module from a batch: bool, `[batch, length]`."""
    if not isinstance(batch, Mapping):
        return {}
    decoder = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", lambda: None)()
    in_decoder = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    masks = (batch.get("attention_mask"), _decoder_mask(batch))  # modules with the same tokens share one tensor
    encoder_mask, decoder_mask = (mask.bool() if _is_mask(mask) else None for mask in masks)
    tokens = {}
    for name, module in modules.items():
        mask = decoder_mask if module in in_decoder else encoder_mask
        if mask is not None:
            tokens[name] = mask
    return tokens


def check_one_device(model: nn.Module) -> None:
    """Raises if accelerate has distributed a model over devices or to disk.

    Sums on several devices cannot be added, and a forward that ends early would leave offloaded weights loaded.
    """
    for module in model.modules():
        devices = {str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(devices) > 1 or "disk" in devices:
            raise ValueError(
                f"model: device_map has distributed it over {', '.join(sorted(devices))}, but it must be on one device. "
                "Load it without device_map, or use bh.stream if it is too large."
            )


def _on_device(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    check_one_device(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def _with_distinct_lengths(batch: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """Gives the decoder another length than the encoder, as masks are matched by length."""
    mask = batch.get("attention_mask")
    inputs = {key: batch[key] for key in ("decoder_input_ids", "labels") if isinstance(batch.get(key), Tensor)}
    if not inputs or not isinstance(mask, Tensor) or mask.shape != next(iter(inputs.values())).shape:
        return batch
    counts = batch.get("decoder_attention_mask")
    if counts is None:
        counts = (batch["labels"] != -100).long() if "labels" in inputs else torch.ones_like(mask)
    if mask.all() and counts.all():
        return batch
    more = -1 if longest is not None and mask.shape[1] >= longest else 1  # a new token does not count
    inputs["decoder_attention_mask"] = counts
    return batch | {key: pad(value, (0, more), value=-100 if key == "labels" else 0) for key, value in inputs.items()}


def _decoder_mask(batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Returns the decoder's mask, by default the tokens with labels."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return labels != -100 if mask is None and isinstance(labels, Tensor) else mask


def _is_mask(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2
