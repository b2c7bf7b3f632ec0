"""Metrics of validation: perplexity per token, and accuracy."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


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


def metrics_of(task: str, num_labels: int | None) -> dict[str, Metric]:
    """Makes the metrics of a task, by name: accuracy for classification, of images of many classes also top 5, or perplexity."""
    if not task.endswith("classification"):
        return {"perplexity": TokenPerplexity()}
    classes = num_labels or 2
    found: dict[str, Metric] = {"accuracy": MulticlassAccuracy(num_classes=classes, average="micro")}
    if task == "image-classification" and classes > TOP:
        found[f"accuracy_top{TOP}"] = MulticlassAccuracy(num_classes=classes, top_k=TOP, average="micro")
    return found
