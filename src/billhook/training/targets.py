"""Stores the predictions of a dense model, for a polish."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from typing_extensions import Self

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import (
    Outputs,
    evaluating_without_grad,
    examples_of,
    inputs_of,
    run_side_by_side,
    runs_of,
    source_of,
    token_outputs,
    tree_map_only,
)
from billhook.model import find_transformer
from billhook.progress import OnProgress

TOP = 64
"""Number of classes whose probabilities are stored, the most likely ones; the rest is stored as one probability."""
LEAST_REST = 1e-6
"""Smallest probability of the rest that is told apart from zero."""


class Target(NamedTuple):
    """An example with the predictions of the dense model.

    Attributes:
        inputs: The model's inputs, one example.
        source: Name of the example's source.
        values: Log-probabilities of the most likely classes and of all others together, float16, `[positions, top + 1]`; or, for
            a model without logits, its token states, bfloat16, `[positions, hidden]`.
        classes: The most likely classes, int32, `[positions, top]`; None for token states.
        width: Number of classes, or size of a token state.
    """

    inputs: dict[str, Any]
    source: str
    values: Tensor
    classes: Tensor | None
    width: int


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> Outputs:
    """Runs a model on an example; see `token_outputs`.

    Raises:
        ValueError: If the model returns neither logits nor token states.
    """
    outputs = token_outputs(runs_of(model, [inputs])[0])
    if outputs is None:
        raise ValueError(f"polish: {type(model).__name__} has neither logits nor token states (last_hidden_state) to compare.")
    return outputs


def divergence(model: nn.Module, target: Target) -> Tensor:
    """Returns the mean divergence from the dense model on an example, float32, `[]`.

    With logits it is KL(p || q) = sum_k p_k (log p_k - log q_k) in nats, where all classes but the `TOP` most likely ones of the
    dense model count as one. It is a lower bound of the divergence over all classes. For a model without logits it is 1 - cosine
    of the token states.

    Raises:
        ValueError: If the outputs of the models differ in size.
    """
    values, _ = outputs_of(model, target.inputs)
    if values.shape[-1] != target.width:
        raise ValueError(
            f"polish: the model has {values.shape[-1]:,} outputs for each position, and the dense model had {target.width:,}. "
            "Predict with the dense model after tokens or hidden dimensions are removed, and before other units are."
        )
    stored = target.values.to(values.device).float()
    if target.classes is None:
        return 1 - cosine_similarity(values.float(), stored, dim=-1).mean()
    log_p = stored.log_softmax(-1)  # as rounded logarithms do not sum to one
    log_q = _with_rest(values.float(), target.classes.to(values.device).long())
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _with_rest(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns log-probabilities of some classes, and of all others together."""
    logs = logits.gather(-1, classes) - logits.logsumexp(-1, keepdim=True)
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(LEAST_REST)
    return torch.cat([logs, rest.log()], -1)


@dataclass(frozen=True, eq=False)
class Targets:
    """Predictions of a dense model, made before it is changed.

    With 50,000 classes and 512 tokens an example takes 0.2 MB.

    Attributes:
        examples: The examples, with their predictions on the CPU.

    Example:
        >>> import torch, billhook as bh
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(i, i + 32)[None]} for i in range(4)]
        >>> len(bh.training.Targets.of(model, batches).examples)
        4
    """

    examples: Sequence[Target]

    def __post_init__(self) -> None:
        check_types(Targets, vars(self))

    @classmethod
    def of(cls, model: nn.Module, batches: Batches, progress: OnProgress | None = None) -> Self:
        """Runs the dense model on batches, and stores its predictions for each of their examples.

        Args:
            model: The dense model.
            batches: Batches of forward inputs, or a `Calibration`.
            progress: Callback with the number of finished examples and the total.

        Raises:
            ValueError: If the model has neither logits nor token states.
        """
        subject = find_transformer(model)
        examples = [(_plain(inputs), source_of(batch)) for batch in read_batches(batches, subject) for inputs in _split(batch)]
        targets: dict[int, Target] = {}

        def predict(number: int) -> None:
            inputs, source = examples[number]
            values, is_logits = outputs_of(subject, inputs)
            classes = values.topk(min(TOP, values.shape[-1])).indices if is_logits else None
            stored = values.bfloat16() if classes is None else _with_rest(values.float(), classes).half()
            stored_classes = None if classes is None else classes.int().cpu()
            targets[number] = Target(inputs, source, stored.cpu(), stored_classes, values.shape[-1])
            if progress is not None:
                progress(len(targets), len(examples))

        with evaluating_without_grad(subject):
            run_side_by_side(subject, [partial(predict, number) for number in range(len(examples))])
        return cls([targets[number] for number in range(len(examples))])

    @property
    def can_hold_out(self) -> bool:
        """True if a source has more than one example."""
        return any(len(examples) > 1 for examples in self.by_source.values())

    def split(self, held_out: int) -> tuple[list[Target], list[Target]]:
        """Returns the examples to train on, and one in `held_out` of each source, evenly spaced."""
        train, held_out_examples = list[Target](), list[Target]()
        for examples in self.by_source.values():
            count = max(1, len(examples) // held_out) if len(examples) > 1 else 0
            chosen = {int((number + 0.5) * len(examples) / count) for number in range(count)}
            held_out_examples += [example for number, example in enumerate(examples) if number in chosen]
            train += [example for number, example in enumerate(examples) if number not in chosen]
        return train, held_out_examples

    @property
    def by_source(self) -> dict[str, list[Target]]:
        """The examples of each source."""
        return by_source(self.examples)


def by_source(examples: Iterable[Target]) -> dict[str, list[Target]]:
    """Groups examples by their source, in order of first occurrence."""
    groups = defaultdict[str, list[Target]](list)
    for example in examples:
        groups[example.source].append(example)
    return dict(groups)


def _split(batch: Any) -> list[Any]:  # noqa: ANN401
    inputs = inputs_of(batch)
    return examples_of(dict(inputs)) if isinstance(inputs, dict) else [inputs]


def _plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies inputs to the CPU, so that the batch that they are a part of is not kept."""
    copied: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), inputs)
    return copied
