"""Makes KV heads ready to be pooled, in the middle of a fit: with its batches, at once or step by step."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from billhook.engine.store import store_of
from billhook.fit.calibration import FitCalibration, Pair
from billhook.fit.ranks import check_agreed, check_near, comm_of, of_first, summed, together
from billhook.fit.shards import in_turn
from billhook.kv_heads.bases.ready import batches_needed, ready_weights, turned_weights
from billhook.kv_heads.convert import check_repair
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.plan import KVHeadPlan
from billhook.kv_heads.pooling import approach
from billhook.model.find import find_transformer
from billhook.model.plan import Weights
from billhook.model.surgery import changed, take
from billhook.repairs.repair import Repair

HINT = (
    "billhook: KV heads are mean-pooled, as in the paper. method='svd' starts far nearer to the dense model (SmolLM2-135M, 3 -> "
    "1 KV heads, perplexity right after: 14,841 with 'mean', 109 with 'svd'); 'auto' takes what stays nearest on held-out batches"
)


@dataclass(frozen=True, eq=False)
class Preparation:
    """How the heads of a group become equal before they are pooled, in the middle of a fit."""

    method: KVMethod
    repair: Repair | None
    calibration: FitCalibration

    def __post_init__(self) -> None:
        check_repair(self.method, self.repair)

    @property
    def needed(self) -> bool:
        """True if there is anything to do before heads are pooled."""
        return self.method.turns or self.repair is not None

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit whose batches can be read only once, or are too few."""
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        self.calibration.check(trainer)
        with self.calibration.aside(pl_module):
            count = sum(1 for _ in islice(self._pairs(trainer, pl_module), least))
        every = int(summed(trainer, torch.tensor(count)))
        if every < least:
            source = f"examples={self.calibration.examples}" if self.calibration.batches is None else "calibration"
            held_out = ", as some are held out" if least > 1 else ""
            many = "a batch" if least == 1 else f"{least} batches"
            raise ValueError(f"{source}: {what} needs {many} at least{held_out}; all devices together have {every}")

    def ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan) -> tuple[KVHeadPlan, Weights, str]:
        """Returns the plan with what restarts, the values that it starts from, and how they came to be."""
        model, groups = find_transformer(pl_module), dict.fromkeys(plan.layers, plan.after)
        with self.calibration.aside(pl_module):
            batches = list(self._pairs(trainer, pl_module))
            comm = comm_of(trainer, self.calibration.shared)
            weights, how = ready_weights(model, groups, self.method, batches, self.repair, comm)
        if not self.method.turns:  # what the mean pools is as it was
            weights = weights.without(plan.parameters)
        return replace(plan, restart=tuple(changed(model, weights))), weights, how

    def check_same(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan, weights: Weights, trained: bool
    ) -> None:
        """Makes sure that ranks convert the same to the same; before DDP has the model, each may have weights of its own.

        New weights may be rounded otherwise: those of the first count, when DDP wraps the model or when they are sharded.
        """
        model = find_transformer(pl_module)
        pooled = {name: [own.dim, np.asarray(own.index)] for name, own in plan.parameters.items()}
        check_agreed(trainer, "KVHeadConversion", "what heads become", [str(self.method), str(self.repair), pooled])
        if trained and not store_of(model).on_ranks:  # what ranks share is the same on each
            before = {name: model.get_parameter(name) for name in plan.parameters}
            check_near(trainer, "KVHeadConversion", "what heads become", before)

    def turned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]) -> Weights:
        """Returns values with which the heads of a group lie in one basis, and the model computes what it did."""
        with self.calibration.aside(pl_module):
            batches, (method,) = list(self._pairs(trainer, pl_module)), self.method.candidates
            return turned_weights(find_transformer(pl_module), groups, method, batches, comm_of(trainer))

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


def _same(trainer: pl.Trainer, model: nn.Module, weights: Weights) -> Weights:
    """Returns new weights, those of the first rank where each has all of them; refuses ranks whose models differ."""
    what = "KVHeadConversion", "how heads are turned"
    if store_of(model).on_ranks:  # each has its shards of those of the first
        return weights
    check_near(trainer, *what, {name: model.get_parameter(name) for name in weights})
    if trainer.world_size == 1:
        return weights
    return {name: of_first(trainer, *what, weights[name]).to(weights[name].device) for name in weights}


@dataclass
class Moving:
    """How far the heads of a group have moved towards each other."""

    moved: int = -1  # the last step after which they did
    turned: list[int] = field(default_factory=list)  # the stages whose heads have been put in one basis
    path: KVHeadPlan | None = None  # to what they move, while it is of the model as it is

    def move(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, preparation: Preparation, stage: int, share: float
    ) -> None:
        """Moves the heads that a stage is to cut along `path`, by a share of the remaining way, once they lie in one basis."""
        model = find_transformer(pl_module)
        if self.path is None:
            return
        if preparation.method.turns and stage not in self.turned:
            groups = dict.fromkeys(self.path.layers, self.path.after)
            with together(trainer, "KVHeadConversion"):
                with in_turn(pl_module):
                    weights = preparation.turned(trainer, pl_module, groups)
                    weights = _same(trainer, model, weights)
                take(model, weights, trainer.optimizers)
            self.turned.append(stage)
        approach(model, self.path.parameters, share, preparation.method.pool)
        self.moved = trainer.global_step

    def fits(self, pl_module: pl.LightningModule) -> bool:
        """Returns whether the model still has the heads that `path` is of."""
        if self.path is None:
            return False
        model, pooled = find_transformer(pl_module), self.path.parameters
        try:
            return all(model.get_parameter(name).shape[one.dim] == len(one.index) for name, one in pooled.items())
        except AttributeError:  # of a block that is gone
            return False
