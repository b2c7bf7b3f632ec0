"""SRSTE: how long masks are learned, and what draws weights that are left out to zero."""

from dataclasses import dataclass

from billhook.arguments import annotated, number
from billhook.schedules import Step, check_step


@dataclass(frozen=True)
class SRSTE:
    """Chooses masks again after each step of an optimizer, while all weights learn, and fixes them at `end` (SR-STE).

    Runs see what is kept, m * W. The gradient of that reaches all of W, as if the mask were not there (straight through), so
    that a weight which is left out can come back; what is left out is drawn to zero besides: g(m * W) + decay (1 - m) * W is
    what the optimizer takes for the gradient. At `end` what is left out becomes zero, and is held there.

    From "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", Zhou et al., ICLR 2021,
    https://arxiv.org/abs/2102.04010, where scores are magnitudes. Here they are a criterion's: with `Wanda` by the norms that
    inputs had at the first moment, and by the weights as they are now.

    Args:
        end: When masks are fixed: a step (int), or a fraction of training (float in 0..1).
        decay: lambda_W, the paper's, at least 0.

    Raises:
        ValueError: If `end` is no moment, or `decay` is negative.

    Example:
        >>> import billhook as bh
        >>> callback = bh.WeightPruning(bh.Wanda(), sparsity=0.5, learn=bh.SRSTE(end=0.6))
    """

    end: Step = 0.6
    decay: float = 2e-4

    def __post_init__(self) -> None:
        annotated(SRSTE, vars(self))
        check_step(self.end, "end")
        number("decay", self.decay, least=0)
