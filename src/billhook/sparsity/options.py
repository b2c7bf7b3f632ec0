"""Options of weight pruning that `prune`, its callbacks, and its command share."""

from collections.abc import Sequence
from dataclasses import dataclass

from billhook.arguments import check_one_of, check_types
from billhook.engine import Sequential
from billhook.model import Convolutions
from billhook.repairs.matching import BlockMatching
from billhook.sparsity.allocation import Allocation


@dataclass(frozen=True)
class PruneOptions:
    """Options of weight pruning: layers, sparsity allocation, and calibration inputs.

    Args:
        sequential: Where calibration statistics come from. `"block"`, as in the papers: inputs of the dense block, computed by
            pruned blocks before it. `"layer"`: inputs of each linear layer, computed by all pruned layers before it, in one
            pass. `"none"`: inputs in the dense model. All calls of a layer count. A layer that is called again after it would be
            pruned (ALBERT, ProphetNet), or that shares its weight, is pruned first, as with `"none"`.
        match: Block-wise reconstruction settings, such as `BlockMatching(lr=0.01)`, applied after each block is pruned. Runs
            each batch twice, pruned and dense. Defaults to None (off).
        allocation: Sparsity allocation, such as `OWL()`. Defaults to the same sparsity for all layers.
        skip: Glob pattern of linear layers to exclude, such as `"*.down_proj"`, or a list of patterns.
        output_embeddings: If True, also prunes the output embedding (`lm_head`), unless it is tied, and classification heads.
        convolutions: Which `nn.Conv1d` and `nn.Conv2d` to prune, as linear layers over patches: `"mixing"` (outputs with at
            least four input channels: no depthwise convolutions, patch embeddings, or stems), `"all"`, or `"none"`, as in
            Wanda's experiments on images.

    Raises:
        ValueError: If an argument is not legal.

    >>> import billhook as bh
    >>> options = bh.PruneOptions(sequential="layer", skip="*.down_proj")
    """

    sequential: Sequential = "block"
    match: BlockMatching | None = None
    allocation: Allocation | None = None
    skip: str | list[str] | None = None
    output_embeddings: bool = False
    convolutions: Convolutions = "mixing"

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, Sequence) or not all(isinstance(pattern, str) for pattern in self.patterns):
            raise ValueError(f"skip={self.skip!r} must be glob patterns of linear layers, such as ['*.down_proj'].")
        check_types(PruneOptions, vars(self))
        check_one_of("sequential", self.sequential, Sequential)
        check_one_of("convolutions", self.convolutions, Convolutions)

    @property
    def patterns(self) -> Sequence[str]:
        """Glob patterns of linear layers to exclude."""
        return [self.skip] if isinstance(self.skip, str) else [] if self.skip is None else self.skip

    @property
    def needs_data(self) -> bool:
        """True if block-wise reconstruction or allocation needs batches."""
        return self.match is not None or (self.allocation is not None and self.allocation.measures)
