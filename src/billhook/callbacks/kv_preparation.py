"""What a fit shows of KV heads, with which they are made ready to be pooled."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from billhook.fit.examples import Pair, aside, check_calibration, check_readable, scoring_batches
from billhook.fit.ranks import SumOverRanks
from billhook.kv_heads.bases.bases import Start
from billhook.kv_heads.bases.ready import Grouping, Way, check_ready, ready_weights, turned_weights
from billhook.kv_heads.convert import Method, Pooling, check_method
from billhook.model.find import find_transformer
from billhook.repairs.repair import Repair
from billhook.running.walk import Reduce


def method_of_pooling(method: Method) -> Pooling:
    """How heads are pooled that are ready: those of most methods are equal by then."""
    if method == "first":
        return "first"
    return "random" if method == "random" else "mean"


@dataclass(frozen=True, eq=False)
class Preparation:
    """How the heads of a group become equal before they are pooled, in the middle of a fit.

    Attributes:
        method: By what rendering.
        grouping: Which heads share a group.
        repair: Whether, and how, what reads the heads is refitted.
        calibration: Batches; None for training examples.
        examples: How many of these.
        seed: Which ones.
    """

    method: Method
    grouping: Grouping
    repair: Repair | None
    calibration: Iterable[Any] | None
    examples: int
    seed: int

    def __post_init__(self) -> None:
        check_method(self.method, self.grouping, self.repair)
        if type(self.examples) is not int or self.examples < 1:
            raise ValueError(f"examples={self.examples!r} must be a whole number of at least 1")
        check_calibration(self.calibration)

    @property
    def turns(self) -> bool:
        """Whether heads are turned or change places."""
        return self.method not in ("mean", "first", "random") or self.grouping == "similar"

    @property
    def needed(self) -> bool:
        """Whether there is anything to do but to pool."""
        return self.turns or self.repair is not None

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without batches."""
        return self.method in ("svd", "auto") or self.repair is not None

    @property
    def told(self) -> str:
        """The method and the grouping, in words."""
        return str(Way(self._start, self.grouping)) if self.turns else self.method

    @property
    def _start(self) -> Start:
        if self.method == "aligned":
            return "aligned"
        return "svd" if self.method == "svd" else "mean"

    def check(self, model: nn.Module, groups: Mapping[str, int]) -> None:
        """Refuses a model whose heads cannot be made ready.

        Raises:
            ValueError: With the reason.
        """
        if self.needed:
            check_ready(model, groups, None if self.method == "auto" else self._start, self.grouping)

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit that cannot give the batches that it takes.

        Raises:
            ValueError: If they can be read only once, or are too few.
        """
        if not self.needs_data:
            return
        if self.calibration is None:
            check_readable(trainer)
        least = 2 if self.method == "auto" or self.repair is not None else 1
        with aside(pl_module, self.seed):
            count = sum(1 for _ in islice(self._pairs(trainer, pl_module), least))
        if int(SumOverRanks(trainer)(torch.tensor(count < least, dtype=torch.int64))):
            source = f"examples={self.examples}" if self.calibration is None else "calibration"
            what = "repair" if self.repair is not None else f"method={self.method!r}"
            held_out = ", as some are held out" if least > 1 else ""
            raise ValueError(f"{source}: {what} needs {least} batches at least on each device{held_out}; here there are {count}")

    def weights(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], str]:
        """By parameter, in the old sizes, the values with which the heads of a group are equal; and how they came to be."""
        with aside(pl_module, self.seed):
            return ready_weights(
                find_transformer(pl_module), groups, "auto" if self.method == "auto" else self._start,
                list(self._pairs(trainer, pl_module)), self.grouping, self.repair, _reduce(trainer),
            )  # fmt: skip

    def turned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]) -> dict[str, Tensor]:
        """The values with which the heads of a group lie in one basis, and the model computes what it did."""
        with aside(pl_module, self.seed):
            way, pairs = Way(self._start, self.grouping), list(self._pairs(trainer, pl_module))
            return turned_weights(find_transformer(pl_module), groups, way, pairs, _reduce(trainer))

    def _pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Pair]:
        """This rank's batches; none where they can be read only once and are not needed."""
        if self.calibration is None and not self.needs_data:
            try:
                check_readable(trainer)
            except ValueError:
                return
        for batch, loss in scoring_batches(trainer, pl_module, self.calibration, self.examples):
            yield batch, partial(_precisely, trainer, loss)


def _precisely(trainer: pl.Trainer, loss: Any, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """A loss in the precision of the fit, while what is made of the batches is in full precision."""
    with trainer.precision_plugin.forward_context():
        found: Tensor = loss(model, batch)
    return found


def _reduce(trainer: pl.Trainer) -> Reduce | None:
    return None if trainer.world_size == 1 else SumOverRanks(trainer)
