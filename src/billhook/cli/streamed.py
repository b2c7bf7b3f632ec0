"""Refuses what one-shot commands cannot do with a streamed model, and reckons how often its blocks are read, and bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from billhook.calibration.generated import GENERATED
from billhook.cli.examples import Text
from billhook.engine.memory import streamed_size
from billhook.engine.store import BlockStore, store_of
from billhook.importance.ablation import Ablation
from billhook.importance.activations import ActivationNorm, OutputNorm
from billhook.importance.baselines import RandomUnits, WeightNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.obs import OBS
from billhook.importance.score import Importance, check_supports_streaming
from billhook.model.layers import prunable, weight_of
from billhook.repairs.residuals import MAX_OUTPUTS
from billhook.sparsity.criteria import Criterion

REFITTED = 2
"""Passes that show which linears are called, and refit them."""
REMOVED = 3
"""Passes in which units are masked, removed, and what is left is compared."""
WITHOUT_BLOCKS = 12
"""Passes that compare what the others compute without some blocks, also with a cache: when it is planned, and when it is done."""


def batch_count(rows: Sequence[int], size: int) -> int:
    """Returns how many batches of a size so many examples of each source make.

    >>> batch_count([20, 5], 8)
    4
    """
    return sum(-(-count // size) for count in rows)


@dataclass
class Passes:
    """How often the blocks of a streamed model are read until units are removed.

    Attributes:
        known: As often as is known before.
        beside: The importances of which that is not known: a user's own.
    """

    known: int = 0
    beside: list[Importance] = field(default_factory=list)

    def to_score(self, times: int, importance: Importance, units: int, count: int) -> None:
        """Adds the passes in which an importance scores units so many times; see `to_score`."""
        once = to_score(importance, units, count)
        if once is not None:
            self.known += times * once
        elif importance not in self.beside:
            self.beside.append(importance)


def to_score(importance: Importance, units: int, count: int) -> int | None:
    """Returns how often blocks are read at most to score units; None for an importance that is not known.

    Args:
        importance: How they are scored.
        units: How many there are.
        count: How many batches there are.
    """
    known = {
        OutputNorm: 2,  # it looks at readers before
        ActivationNorm: 1,
        BlockInfluence: 1,
        Ablation: 1 + units,
        WeightNorm: 1,
        RandomUnits: 0,
    }
    each = importance.passes if isinstance(importance, OBS) else known.get(type(importance))
    if each is None or not importance.needs_data:
        return each
    return each * count if isinstance(importance, Ablation) else each


AFTERWARDS = 3
"""Passes over the blocks that count zeros, say which logits the checkpoint must give, and compare it."""

TUNED = 6
"""Copies of a block in float32 while it is tuned: as it is, its gradient, two means of Adam's, the best so far, and what was."""
STEPPED = 8
"""Matrices like some rows of the weight that a refit steps in: six of conjugate gradients, what is owed, and mixtures of it."""
OBS_BYTES = 4 + 8
"""Bytes for each pair of inputs: a matrix in float32, and one in float64."""


def check_streamed(examples: Text, streams: bool, offload: bool, reads: bool) -> None:
    """Refuses what cannot be done with a model that is streamed, of which `reads` says whether it is shown any text."""
    if not streams:
        raise ValueError("stream=True: this command needs gradients, or all weights at once: leave it out")
    if offload:
        raise ValueError("offload=True keeps the model in memory, and stream=True does not: ask for one")
    sources = examples.data if isinstance(examples.data, list) else [examples.data]
    if reads and (examples.generated or any(source in (None, GENERATED) for source in sources)):
        raise ValueError(
            f"data={examples.data!r}: a streamed model is read once for each token that it writes: name a file of text"
        )


def check_scored(examples: Text, *importances: Importance | None) -> None:
    """Refuses importances that need gradients, of a model that is streamed; before anything of it is read."""
    for importance in importances if examples.stream else ():
        if importance is not None:
            check_supports_streaming(importance)


def bytes_of_moments(model: PreTrainedModel, by: Criterion | Importance | None) -> int:
    """Returns the bytes of the largest statistics of a linear that weights or units are scored by, with what is made of them."""
    return max((_to_score(by, weight_of(linear).shape[1]) for linear in prunable(model).values()), default=0)


def _to_score(by: Criterion | Importance | None, columns: int) -> int:
    if isinstance(by, Criterion):
        statistics = by.statistics(columns, "meta")
        return 0 if statistics is None else by.copies * sum(tensor.nbytes for tensor in statistics.tensors())
    return OBS_BYTES * columns**2 if isinstance(by, OBS) else 0


def bytes_of_refit(model: PreTrainedModel, parts: int, kept: Mapping[str, int] | None = None) -> tuple[int, int]:
    """Returns the bytes that the largest refit of a linear takes to solve, and those of its moments, which may lie in files.

    Args:
        model: The model.
        parts: Of how many parts of the data moments are kept.
        kept: How many inputs are left to each linear that is refitted; by default all linears keep all.
    """
    solved = summed = 0
    for name, linear in prunable(model).items():
        rows, columns = weight_of(linear).shape
        if kept is not None:
            columns = kept.get(name, 0)
        weights = 2 * model.dtype.itemsize * rows * columns  # as it was, and as it is then
        solved = max(solved, 8 * columns * (columns + STEPPED * min(rows, MAX_OUTPUTS)) + weights)
        summed = max(summed, 8 * parts * columns * (columns + rows))
    return solved, summed


def bytes_of_match(model: PreTrainedModel) -> int:
    """Returns the bytes that tuning the largest block takes, without what a batch leaves for its gradients."""
    return TUNED * 4 * streamed_size(store_of(model)).largest // model.dtype.itemsize


def reads(store: BlockStore, passes: int, exactly: bool = True, beside: Sequence[object] = ()) -> str:
    """Says how many bytes are read and written, if so many passes, or as many at most, change and measure the blocks.

    What is named in `beside` reads them besides, nobody knows how often.
    """
    extent, passes = streamed_size(store), passes + AFTERWARDS
    read, written = (f"{size / 1e6:,.1f} MB" for size in (passes * extent.bytes, extent.bytes + extent.stays))
    most = "" if exactly else "at most "
    more = f", and as often as {' and '.join(map(str, beside))} needs" if beside else ""
    return f"read {extent.blocks} blocks from files in {most}{passes} passes, {read}{more}, and write {written}"
