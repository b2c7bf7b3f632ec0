"""A criterion, an allocation and a schedule in a user's own file: named by class_path, with nothing else changed."""

from dataclasses import dataclass

import jsonargparse
import pytest
import torch

import billhook as bh
from billhook.model.layers import prunable
from billhook.schedules import Ramp
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.criteria import Comparison, Criterion
from kit.fits import data, module, trainer


@dataclass(frozen=True)
class LargestFirst(Criterion):
    """Removes the largest weights."""

    compares: Comparison = "layer"

    def score(self, weight, statistics=None):
        return torch.where(weight == 0, -torch.inf, -weight.detach().abs().float())


@dataclass(frozen=True)
class FirstBlockMore(Allocation):
    """A sparsity of its own for the first block."""

    first: float = 0.75

    def allocate(self, blocks, sparsity, measured=()):
        return {name: self.first if not number else sparsity for number, block in enumerate(blocks) for name in block}


@dataclass(frozen=True)
class Square(Ramp):
    """Slow at first."""

    def at(self, progress):
        return self.initial + (self.final - self.initial) * progress**2


def path(kind, **settings):
    return {"class_path": f"{__name__}.{kind.__name__}", "init_args": settings}


def shares(model):
    return {name: round((linear.weight == 0).float().mean().item(), 3) for name, linear in prunable(model).items()}


def expected(model, first, others):
    return {name: first if ".0." in name else others for name in prunable(model)}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_in_a_fit_from_yaml(tmp_path, files):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(bh.WeightPruning, "pruning")
    settings = {
        "criterion": path(LargestFirst),
        "options": {"allocation": path(FirstBlockMore)},
        "sparsity": path(Square, final=0.5, end=4, every=2),
        "measure_batches": 0,
    }
    callback = parser.instantiate(parser.parse_object({"pruning": settings})).pruning
    assert isinstance(callback.criterion, LargestFirst)
    assert isinstance(callback.options.allocation, FirstBlockMore)
    lit, seen = module(intermediate_size=32), []
    lit.on_train_batch_start = lambda *_: seen.append(shares(lit.model))
    trainer(tmp_path, [callback], max_steps=5).fit(lit, data(files))
    assert seen == [expected(lit.model, *pair) for pair in [(0, 0)] * 2 + [(0.75, 0.125)] * 2 + [(0.75, 0.5)]]
