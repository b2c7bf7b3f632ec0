"""Inputs of one linear, and masks by a stable sort."""

import numpy as np
import torch

import billhook  # noqa: F401 - defines every criterion
from billhook.sparsity.criteria import Criterion

OUT, IN = 24, 160


def all_criteria(parent=Criterion):
    """Every criterion there is, with the paper's settings."""
    for kind in parent.__subclasses__():
        yield kind
        yield from all_criteria(kind)


CRITERIA = sorted({c for c in all_criteria() if c.__module__.startswith("billhook")}, key=lambda c: c.__name__)


def make_inputs(in_features=IN, tokens=400):
    """Inputs with outlying features, and features that go together."""
    mix = torch.eye(in_features) + 0.3 * torch.randn(in_features, in_features) / in_features**0.5
    return torch.randn(tokens, in_features) * torch.rand(in_features).add(0.1) ** 2 @ mix


def seen(criterion, inputs):
    """The statistics of inputs that a criterion asks for."""
    statistics = criterion.statistics(inputs.shape[1])
    if statistics is not None:
        statistics.add(inputs)
    return statistics


def stable_sort_rows(scores, count):
    order = np.argsort(scores.numpy(), axis=1, kind="stable")[:, :count]
    keep = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(keep, order, values=False, axis=1)
    return torch.from_numpy(keep)


def stable_sort_layer(scores, count):
    return stable_sort_rows(scores.reshape(1, -1), count).view(scores.shape)
