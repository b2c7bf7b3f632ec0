"""Settings of a polish: training of the smaller model toward the dense model."""

from dataclasses import dataclass
from typing import Literal

from billhook.arguments import check_int, check_number, check_one_of, check_types

Trained = Literal["scales", "lora", "all"]
"""What a polish trains: norms, biases and a factor per input of the consumer layers; LoRA; or all weights."""
LR: dict[Trained, float] = {"scales": 3e-3, "lora": 1e-3, "all": 3e-4}
"""Peak learning rates to begin with."""
SMALLER, RESTARTS = 3.0, 2
"""Divisor of the learning rate if the first check is worse than the start, and how often training then begins again."""


@dataclass(frozen=True)
class PolishConfig:
    """Settings of a polish, which trains a smaller model toward the dense model.

    The loss is KL(dense || model) of the predictions at temperature 1, without labels. Without logits, it is 1 - cosine of the
    token states. All sources of the data are drawn equally often. The result is the point between start and end that is
    best for the source that is farthest from the dense model on held-out examples, so that no polish makes that worse. Zeros of
    pruned layers stay zero.

    Args:
        steps: Number of optimizer steps.
        trains: "scales" trains norms, biases, and a factor per input of the layers that read heads and channels, which is
            multiplied into their weights afterward; "lora" trains adapters, which are merged; "all" trains all weights.
        lr: Peak learning rate. Defaults to 0.003, 0.001 with "lora", and 0.0003 with "all"; if the held-out divergence has risen
            after a third of the steps, training begins again with a third of that, at most twice.
        batch_size: Examples per step.
        seed: Seed for the order of examples and for initial adapters.

    Raises:
        ValueError: If a number is out of range, or `trains` is not one of these.

    Example:
        >>> import billhook as bh
        >>> longer = bh.PolishConfig(steps=300, trains="all")
    """

    steps: int = 60
    trains: Trained = "scales"
    lr: float | None = None
    batch_size: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(PolishConfig, vars(self))
        check_int("steps", self.steps)
        check_one_of("trains", self.trains, LR)
        check_number("lr", lr_of(self), above=0)
        check_int("batch_size", self.batch_size)
        check_int("seed", self.seed, 0)


def lr_of(how: PolishConfig) -> float:
    """Returns the learning rate that a polish begins with."""
    return LR[how.trains] if how.lr is None else how.lr
