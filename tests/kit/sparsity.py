"""Small models, batches and linears for pruning weights, and masks by a stable sort."""

import warnings

import numpy as np
import torch
from small_configs import architectures, build, small_config
from torch import nn

import billhook
from billhook.model import inputs
from billhook.model.layers import prunable, weight_of
from billhook.sparsity.criteria import Criterion

OUT, IN = 24, 160


for public in dir(billhook):  # which imports what defines them
    getattr(billhook, public)


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


def batches_of(model, number=3):
    batches = []
    for seed in range(number):
        torch.manual_seed(seed)
        batch = {name: value for name, value in inputs.make_inputs(model).items() if isinstance(value, torch.Tensor)}
        for name, value in batch.items():
            if name.endswith("input_ids"):
                batch[name] = torch.randint_like(value, 3, 20)
            elif value.is_floating_point():
                batch[name] = torch.randn_like(value)
        batches.append(batch)
    return batches


def family(name):
    _, _, config_class, model_class = max(architectures(name), key=lambda one: "Seq2Seq" in one[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(small_config(config_class), model_class)


def weight_named(model, name):
    """The weight that a mask is for: of a layer, or of all experts."""
    weights = dict(model.named_parameters())
    return weights[name if name in weights else f"{name}.weight"]


def masks_of(model):
    return {name: weight_of(linear) != 0 for name, linear in prunable(model).items()}


class Forked(nn.Module):
    """Two linears that read one tensor in the first batch only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, y=None):
        return self.one(x) + self.two(x if y is None else y)


class Routed(nn.Module):
    """Experts of which each batch says which it goes to."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x, experts):
        for block, chosen in zip(self.blocks, experts, strict=True):
            x = block(x, chosen)
        return x
