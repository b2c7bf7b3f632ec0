"""Sets how much a command does so that its result stays close to the dense model."""

from dataclasses import dataclass
from typing import Literal

from billhook.arguments import check_one_of, check_types
from billhook.pruning.repair import RepairOption
from billhook.repairs.matching import BlockMatching
from billhook.repairs.polish import PolishConfig
from billhook.repairs.repair import RepairConfig

Level = Literal["fast", "default", "best"]
LEVELS = ("fast", "default", "best")
EXAMPLES = {"fast": 1, "default": 1, "best": 2}
"""Calibration examples of each level, as a multiple of the default number."""


@dataclass(frozen=True)
class Effort:
    """How close the result stays to the dense model, and how long that takes.

    Args:
        effort: "fast" only makes the change; "default" also refits the layers that read removed units, and polishes scales;
            "best" reconstructs each block after that, polishes all weights, and calibrates on twice as many examples.
        polish: Training toward the dense model's predictions at the end (see `PolishConfig`). "auto" does what `effort` says if
            there is calibration data and the model is in memory; null skips it.

    Raises:
        ValueError: If an option is not legal.
    """

    effort: Level = "default"
    polish: PolishConfig | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        check_one_of("effort", self.effort, LEVELS)
        check_types(Effort, vars(self))

    def repair(self, repair: RepairOption) -> RepairOption:
        """Resolves the settings of the repair: "auto" depends on the level."""
        if repair != "auto" or self.effort == "default":
            return repair
        return None if self.effort == "fast" else RepairConfig(match=BlockMatching())

    def match(self, match: BlockMatching | None) -> BlockMatching | None:
        """Returns the settings of block-wise reconstruction of pruned weights."""
        return BlockMatching() if match is None and self.effort == "best" else match

    @property
    def polishing(self) -> PolishConfig | None:
        """The settings of the polish."""
        if self.polish != "auto":
            return self.polish
        return {"fast": None, "default": PolishConfig(), "best": PolishConfig(trains="all")}[self.effort]
