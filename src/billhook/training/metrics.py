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


def metric_of(task: str, num_labels: int | None) -> Metric:
    """Makes the metric of a task: accuracy for classification, perplexity for all others."""
    if task.endswith("classification"):
        return MulticlassAccuracy(num_classes=num_labels or 2, average="micro")
    return TokenPerplexity()
