"""Batches of a fit, with which KV heads are made ready to be pooled."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from billhook.fit.calibration import Calibration, Pair
from billhook.fit.ranks import check_agreed, sum_over, summed
from billhook.kv_heads.bases.ready import batches_needed, check_ready, ready_weights, turned_weights
from billhook.kv_heads.convert import check_repair
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.plan import KVHeadPlan
from billhook.model.find import find_transformer
from billhook.model.plan import Weights
from billhook.model.surgery import changed
from billhook.repairs.repair import Repair

HINT = (
    "billhook: KV heads are mean-pooled, as in the paper. method='svd' starts far nearer to the dense model (SmolLM2-135M, 3 -> "
    "1 KV heads, perplexity right after: 14,841 with 'mean', 109 with 'svd'); 'auto' takes what is best on held-out batches"
)


@dataclass(frozen=True, eq=False)
class Preparation:
    """How the heads of a group become equal before they are pooled, in the middle of a fit."""

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
        """Refuses a model whose heads cannot be made ready."""
        if self.needed:
            check_ready(model, groups, self.method)

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit whose batches can be read only once, or are too few."""
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        self.calibration.check(trainer)
        with self.calibration.aside(pl_module):
            count = sum(1 for _ in islice(self._pairs(trainer, pl_module), least))
        if int(summed(trainer, torch.tensor(count < least, dtype=torch.int64))):
            source = f"examples={self.calibration.examples}" if self.calibration.batches is None else "calibration"
            held_out = ", as some are held out" if least > 1 else ""
            raise ValueError(f"{source}: {what} needs {least} batches at least on each device{held_out}; here there are {count}")

    def ready(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan
    ) -> tuple[KVHeadPlan, dict[str, Tensor], str]:
        """Returns the plan with what restarts, the values that it starts from, and how they came to be."""
        model, groups = find_transformer(pl_module), dict.fromkeys(plan.layers, plan.after)
        with self.calibration.aside(pl_module):
            batches = list(self._pairs(trainer, pl_module))
            weights, how = ready_weights(model, groups, self.method, batches, self.repair, sum_over(trainer))
        if not self.method.turns:  # what the mean pools is as it was
            weights = {name: values for name, values in weights.items() if name not in plan.parameters}
        return replace(plan, restart=tuple(changed(model, weights))), weights, how

    def check_same(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan, weights: Weights, trained: bool
    ) -> None:
        """Makes sure that ranks convert the same to the same; before DDP has the model, each may have weights of its own."""
        model = find_transformer(pl_module)
        pooled = {name: [own.dim, np.asarray(own.index)] for name, own in plan.parameters.items()}
        before = {name: model.get_parameter(name) for name in plan.parameters} if trained else {}
        check_agreed(trainer, "KVHeadConversion", "what heads become", [pooled, before, weights])

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
