"""Batches of a fit, with which KV heads are made ready to be pooled."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from billhook.fit.calibration import Calibration, Pair
from billhook.fit.ranks import SumOverRanks, sum_over
from billhook.kv_heads.bases.ready import batches_needed, check_ready, ready_weights, turned_weights
from billhook.kv_heads.convert import check_repair
from billhook.kv_heads.methods.base import KVMethod
from billhook.model.find import find_transformer
from billhook.repairs.repair import Repair


@dataclass(frozen=True, eq=False)
class Preparation:
    """How the heads of a group become equal before they are pooled, in the middle of a fit.

    Attributes:
        method: How heads become one.
        repair: Whether, and how, what reads the heads is refitted.
        calibration: Batches that show what heads do.
    """

    method: KVMethod
    repair: Repair | None
    calibration: Calibration

    def __post_init__(self) -> None:
        check_repair(self.method, self.repair)

    @property
    def needed(self) -> bool:
        """True if there is anything to do before heads are pooled."""
        return self.method.turns or self.repair is not None

    def check(self, model: nn.Module, groups: Mapping[str, int]) -> None:
        """Refuses a model whose heads cannot be made ready.

        Raises:
            ValueError: With the reason.
        """
        if self.needed:
            check_ready(model, groups, self.method)

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit that cannot give the batches that it takes.

        Raises:
            ValueError: If they can be read only once, or are too few.
        """
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        self.calibration.check(trainer)
        with self.calibration.aside(pl_module):
            count = sum(1 for _ in islice(self._pairs(trainer, pl_module), least))
        if int(SumOverRanks(trainer)(torch.tensor(count < least, dtype=torch.int64))):
            source = f"examples={self.calibration.examples}" if self.calibration.batches is None else "calibration"
            held_out = ", as some are held out" if least > 1 else ""
            raise ValueError(f"{source}: {what} needs {least} batches at least on each device{held_out}; here there are {count}")

    def weights(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], str]:
        """Returns by parameter, in the old sizes, values with which the heads of a group are equal, and how they came to be."""
        model = find_transformer(pl_module)
        with self.calibration.aside(pl_module):
            batches = list(self._pairs(trainer, pl_module))
            return ready_weights(model, groups, self.method, batches, self.repair, sum_over(trainer))

    def turned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]) -> dict[str, Tensor]:
        """Returns values with which the heads of a group lie in one basis, and the model computes what it did."""
        with self.calibration.aside(pl_module):
            batches, (method,) = list(self._pairs(trainer, pl_module)), self.method.candidates
            return turned_weights(find_transformer(pl_module), groups, method, batches, sum_over(trainer))

    def _pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Pair]:
        """Yields this rank's batches; none where they can be read only once and are not needed."""
        if not batches_needed(self.method, self.repair)[0]:
            try:
                self.calibration.check(trainer)
            except ValueError:
                return
        for batch, loss in self.calibration.pairs(trainer, pl_module):
            yield batch, partial(_precisely, trainer, loss)


def _precisely(trainer: pl.Trainer, loss: Any, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """Returns a loss in the precision of the fit, while what is made of the batches is in full precision."""
    with trainer.precision_plugin.forward_context():
        found: Tensor = loss(model, batch)
    return found
