"""What the ranks of a fit know together."""

import lightning.pytorch as pl
from torch import Tensor


class SumOverRanks:
    """Sums a tensor over all ranks, in place.

    Args:
        trainer: The trainer of the fit.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer

    def __call__(self, tensor: Tensor) -> Tensor:
        """The sum."""
        on_device = tensor.to(self.trainer.strategy.root_device, copy=True)
        summed: Tensor = self.trainer.strategy.reduce(on_device, reduce_op="sum")
        return tensor.copy_(summed)
