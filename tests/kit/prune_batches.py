"""A model whose blocks fork."""

from torch import nn


class Forked(nn.Module):
    """Two linears that read one tensor in the first batch only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, y=None):
        return self.one(x) + self.two(x if y is None else y)
