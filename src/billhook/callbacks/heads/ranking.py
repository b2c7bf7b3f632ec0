"""Scores the heads of the model in a fit, and chooses those that are masked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.enough import Settled
from billhook.callbacks.heads.record import HeadRecord
from billhook.engine.sharding import sizes_only
from billhook.fit.calibration import FitCalibration, gradient_precision
from billhook.fit.ranks import comm_of
from billhook.fit.shards import in_turn
from billhook.importance.base import Importance
from billhook.importance.enough import score_enough
from billhook.importance.score import Scoring, run_of
from billhook.model.find import find_transformer
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import among_others, choose
from billhook.pruning.planning import plan_units
from billhook.units.find import find_units
from billhook.units.units import Per, Units


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """How heads are ranked, and how many of a layer may be chosen: arguments of `HeadPruning`."""

    importance: Importance
    ranking: Ranking
    per: Per
    min_heads: int
    normalize: bool
    removes: bool  # and does not only mask

    def check(self, model: PreTrainedModel, record: HeadRecord, ratio: float) -> None:
        """Refuses a ratio that cannot be reached, with the least that removes a head, and heads that cannot be removed."""
        heads = find_units(model, "head")
        flat = {name: torch.zeros(one.count(self.per)) for name, one in heads.items()}
        chosen = self._lowest(heads, record.left(ratio), flat)
        if ratio > 0 and not chosen and not record.first:
            total = sum(map(len, flat.values()))
            least = next((number / total for number in range(1, total) if self._lowest(heads, number / total, flat)), None)
            which = f"the smallest ratio that does is {least:.4g}" if least else "no ratio does"
            raise ValueError(f"ratio={ratio} removes no head; {which}")
        if self.removes:
            with sizes_only(model):
                plan_units(model, chosen, per=self.per)

    def choose(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        calibration: FitCalibration,
        record: HeadRecord,
        masked: Mapping[str, Sequence[int]],
        ratio: float,
    ) -> tuple[dict[str, list[int]], Settled | None]:
        """Returns the heads to mask of the model as it is, among them all that are masked already; the record gets the scores.

        Also returns how settled the choice is, where the calibration asks for it.
        """
        model = find_transformer(pl_module)
        heads = find_units(model, "head")
        record.begin({name: one.count(self.per) for name, one in heads.items()})
        chosen = partial(among_others, partial(self._lowest, heads, record.left(ratio)), masked)
        with calibration.aside(pl_module), gradient_precision(trainer), in_turn(pl_module):
            pairs = calibration.pairs(trainer, pl_module) if self.importance.needs_data else ()
            trials = [run_of(model, heads, *pair) for pair in pairs]
            scoring = Scoring(model, heads, self.importance, None, self.normalize, self.per, comm_of(trainer))
            scores, settled = score_enough(scoring, trials, chosen, calibration.enough)
        record.scored(scores)
        return chosen(scores), settled

    def _lowest(self, heads: Mapping[str, Units], ratio: float, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return choose(heads, scores, ratio, self.ranking, self.min_heads, self.per, self.removes)
