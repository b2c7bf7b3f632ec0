"""Which linears are pruned, and by what inputs: what `prune`, its callbacks and its command have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from billhook.arguments import check_one_of, check_types
from billhook.engine.walk import Sequential
from billhook.model.layers import Convolutions
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.matching import BlockMatching


@dataclass(frozen=True)
class PruneOptions:
    """Says which linears are pruned, how sparse each becomes, and by what inputs.

    Args:
        sequential: The inputs that a layer's statistics are taken from. `"block"`, the papers': those of the dense block, on the
            outputs of pruned blocks before it. `"layer"`: those of each linear on the outputs of all pruned ones before it, in
            one pass. `"none"`: those of the dense model. All calls of a linear count; one that is called again after its block
            or itself would be pruned (ALBERT's, ProphetNet's), or shares its weight, is pruned first, as with `"none"`.
        match: How what is kept of a block is tuned, once its linears are pruned, so that the block gives what it gave in the
            dense model, such as `BlockMatching(lr=0.01)`; by default not at all. Runs go twice then, pruned and dense.
        allocation: How the sparsity is shared among linears, such as `OWL()`; the same for each by default.
        skip: A glob pattern of linears to leave alone, such as `"*.down_proj"`, or a list of them.
        output_embeddings: Whether the output embedding (`lm_head`) is pruned too, where it is not tied to an embedding, and the
            head of a classifier.
        convolutions: Which `nn.Conv1d` and `nn.Conv2d` are pruned, each as a linear over the patches that its outputs read:
            `"mixing"`, those of which an output reads four channels or more, so not depthwise ones, patch embeddings and stems;
            `"all"`; or `"none"`, as in Wanda's experiments on images.

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
            raise ValueError(f"skip={self.skip!r} must be glob patterns of linears, as in ['*.down_proj']")
        check_types(PruneOptions, vars(self))
        check_one_of("sequential", self.sequential, Sequential)
        check_one_of("convolutions", self.convolutions, Convolutions)

    @property
    def patterns(self) -> Sequence[str]:
        """The glob patterns of linears to leave alone."""
        return [self.skip] if isinstance(self.skip, str) else [] if self.skip is None else self.skip

    @property
    def needs_data(self) -> bool:
        """True if matching or allocation take batches."""
        return self.match is not None or (self.allocation is not None and self.allocation.measures)
