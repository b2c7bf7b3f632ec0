"""Metrics of validation: perplexity per token, and accuracy."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import PreTrainedModel


class TokenPerplexity(Metric):
    """Perplexity per token, exp(sum of losses / number of tokens), whatever the number of tokens in each batch."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor) -> None:
        """Takes a batch's mean loss and the number of tokens that it is the mean of."""
        # not in place: after trainer.validate the states are inference tensors, which a fit may not write into
        self.total = self.total + loss.detach().float() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Returns exp(sum of losses / number of tokens)."""
        return torch.exp(self.total / self.tokens)


TOP = 5
"""How many classes an image may be taken for, in the second accuracy of image classification."""


WRITTEN = 128
"""Tokens that a model writes at most, where its generation config names no `max_new_tokens`."""


def metric_name(task: str) -> str:
    """Returns the name of a task's first metric."""
    return "accuracy" if task.endswith("classification") or task == "feature-extraction" else "perplexity"


def metrics_of(task: str, num_labels: int | None) -> dict[str, Metric]:
    """Makes the metrics of a task, by name: accuracy for classification, of images of many classes also top 5, or perplexity.

    Of images and captions it is the share of images of a batch to which of all its captions their own is nearest.
    """
    name, classes = metric_name(task), num_labels or 2
    if name == "perplexity":
        return {name: TokenPerplexity()}
    if task == "feature-extraction":
        return {name: MeanMetric()}
    metrics: dict[str, Metric] = {name: MulticlassAccuracy(num_classes=classes, average="micro")}
    if task == "image-classification" and classes > TOP:
        metrics[f"accuracy_top{TOP}"] = MulticlassAccuracy(num_classes=classes, top_k=TOP, average="micro")
    return metrics


def counted(batch: Mapping[str, Any], causal: bool) -> Tensor:
    """Counts what the loss of a batch is the mean of: labels, or, where there are none, examples."""
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        return torch.tensor(len(next(value for value in batch.values() if isinstance(value, Tensor))))
    # a causal model predicts each label but the first
    return ((labels[:, 1:] if causal else labels) != -100).sum()


def observed(metric: Metric, output: Any, batch: Mapping[str, Any], weight: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Returns what a metric takes of a batch and a model's output for it."""
    if isinstance(metric, TokenPerplexity):
        return output.loss, weight
    if isinstance(metric, MeanMetric):
        nearest = output.logits_per_image.argmax(-1)
        return ((nearest == torch.arange(len(nearest), device=nearest.device)).float(),)
    return output.logits, batch["labels"]


def written(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """Returns what an encoder-decoder writes of a batch, token ids, `[batch, length]`.

    It is at most `max_new_tokens` of the generation config, or else as long as that and the places of the decoder allow, or 128.
    """
    generation, room = model.generation_config, getattr(model.config, "max_target_positions", None)
    limit = {"max_new_tokens": getattr(generation, "max_new_tokens", None) or WRITTEN}
    if room and not getattr(generation, "max_new_tokens", None):  # Whisper's own warns of both
        limit = {"max_length": min(getattr(generation, "max_length", None) or WRITTEN, room)}
    inputs = {name: batch[name] for name in (model.main_input_name, "attention_mask") if batch.get(name) is not None}
    ids: Tensor = model.generate(**inputs, **limit)  # type: ignore[operator]
    return ids
