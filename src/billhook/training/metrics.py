"""Validation metrics: perplexity per token, and accuracy."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

TOP = 5  # the k of top-k accuracy in image classification


class TokenPerplexity(Metric):
    """Perplexity per token: exp(sum of losses / number of tokens), over batches of any size."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor) -> None:
        """Adds a batch's mean loss and its number of tokens, both `[]`."""
        # not in place: after trainer.validate the states are inference tensors, which training must not modify
        self.total = self.total + loss.detach().float() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Returns exp(sum of losses / number of tokens)."""
        return torch.exp(self.total / self.tokens)


def metric_name(task: str) -> str:
    """Returns the name of a task's first metric."""
    return "accuracy" if task.endswith("classification") or task == "feature-extraction" else "perplexity"


def metrics_of(task: str, num_labels: int | None) -> dict[str, Metric]:
    """Creates the metrics of a task: accuracy for classification, otherwise perplexity.

    Image classification with many classes also has top-5 accuracy. The accuracy of `feature-extraction` is the fraction of
    images in a batch whose most similar caption is their own.
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
