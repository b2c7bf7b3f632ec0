"""Sets how much a command does so that its result stays close to the dense model."""

from dataclasses import dataclass
from typing import Literal

from billhook.arguments import check_one_of, check_types
from billhook.cli.examples import TextOptions
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

    def polish_for(self, options: TextOptions, calibrates: bool, offload: bool) -> PolishConfig | None:
        """Returns the settings of the polish, if the command can polish.

        Args:
            options: Data options of the command.
            calibrates: Whether the command has calibration data without a polish.
            offload: Whether blocks are in CPU memory.

        Raises:
            ValueError: If a polish is asked for of a model that is not in memory.
        """
        if isinstance(self.polish, PolishConfig) and (options.stream or offload):
            raise ValueError(
                f"polish={self.polish} needs all weights in memory, so it does not go with stream or offload. Remove it, and "
                "train the result with billhook fit and distillation."
            )
        if self.polish != "auto":
            return self.polish
        if options.stream or offload or not (calibrates or options.data is not None):
            return None
        return {"fast": None, "default": PolishConfig(), "best": PolishConfig(trains="all")}[self.effort]
