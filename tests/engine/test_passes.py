"""Whether a run passes a model's blocks one after the other."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from billhook.engine.passes import watch_call_order


class Model(nn.Module):
    """Two blocks of two linears, called in some way."""

    def __init__(self, way):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.way = way

    def forward(self, x):
        return self.way(x, *self.blocks)


OTHER = nn.Sequential(nn.Linear(4, 4))
"""A block of another model, which is sharded with it."""
WAYS = {
    "one after the other": (lambda x, a, b: b(a(x)), True),
    "the last one first": (lambda x, a, b: a(b(x)), True),
    "one not at all": (lambda x, a, b: a(x), True),
    "one again": (lambda x, a, b: a(b(a(x))), False),
    "a part of one": (lambda x, a, b: b(a[1](a[0](x))), False),
    "a part of one that has been called": (lambda x, a, b: a[0](b(a(x))), False),
    "another model's": (lambda x, a, b: b(a(OTHER(x))), False),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_orderly(name):
    way, orderly = WAYS[name]
    model = Model(way)
    owner = {part: block for block in (*model.blocks, OTHER) for part in block.modules()}
    with watch_call_order(SimpleNamespace(owner=owner, on_ranks=True), model) as seen:
        model(torch.ones(1, 4))
    assert seen.orderly == orderly
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in owner)
