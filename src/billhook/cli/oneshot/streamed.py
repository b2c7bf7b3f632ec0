"""Refuses what one-shot commands cannot do with a streamed model, and finds room for what they hold and its blocks hand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from billhook.arguments import memory_of
from billhook.calibration.generated import NAME as GENERATED
from billhook.cli.oneshot.text import Text
from billhook.engine.files import Stream, stream_of
from billhook.engine.memory import extent_of, fits, give_back
from billhook.engine.statistics import ROWS
from billhook.importance.base import Importance
from billhook.importance.obs import OBS
from billhook.importance.score import check_streams
from billhook.model.config_fields import text_config
from billhook.model.linears import is_pruned, prunable, weight_of
from billhook.pruning.cuts import Cut
from billhook.pruning.target import Search
from billhook.repairs.moments import OUTPUTS
from billhook.report.predictions import BYTES as PREDICTIONS
from billhook.sparsity.criteria import Criterion

AFTERWARDS = 3
"""Passes over the blocks that count zeros, say which logits the checkpoint must give, and compare it."""

HELD = 5
"""Tensors of the hidden size that a run holds while it waits within a block: the stream, its norm, queries, keys and values."""
TUNED = 6
"""Copies of a block in float32 while it is tuned: as it is, its gradient, two means of Adam's, the best so far, and what was."""
STEPPED = 6
"""Matrices like rows of the weight in conjugate gradients: what is found, what is left, that scaled, a way, and two products."""
OBS_BYTES = 2 * 4 + 8
"""Bytes for each pair of inputs: two matrices in float32, as more and more batches are taken, and one of a reader in float64."""


def check_streamed(given: Text, streams: bool, offload: bool, reads: bool) -> None:
    """Refuses what cannot be done with a model that is streamed, of which `reads` says whether it is shown any text."""
    if not streams:
        raise ValueError("stream=True: this command needs gradients, or all weights at once: leave it out")
    if offload:
        raise ValueError("offload=True keeps the model in memory, and stream=True does not: ask for one")
    if given.device not in ("auto", "cpu"):
        raise ValueError(f"device={given.device!r}: a streamed model computes on the CPU: leave it out")
    sources = given.data if isinstance(given.data, list) else [given.data]
    if reads and (given.generated or any(source in (None, GENERATED) for source in sources)):
        raise ValueError(f"data={given.data!r}: a streamed model is read once for each token that it writes: name a file of text")


def check_scored(given: Text, *importances: Importance | None) -> None:
    """Refuses importances that need gradients, of a model that is streamed; before anything of it is read."""
    for importance in importances if given.stream else ():
        if importance is not None:
            check_streams(importance)


def bytes_of_moments(model: PreTrainedModel, by: Criterion | Importance | None) -> int:
    """Returns the bytes of the largest statistics of a linear that weights or units are scored by, with what is made of them."""
    return max((_to_score(by, weight_of(linear).shape[1]) for linear in prunable(model).values()), default=0)


def _to_score(by: Criterion | Importance | None, columns: int) -> int:
    if isinstance(by, Criterion):
        statistics = by.statistics(columns, "meta")
        return 0 if statistics is None else by.copies * sum(one.nbytes for one in statistics.tensors())
    return OBS_BYTES * columns**2 if isinstance(by, OBS) else 0


@dataclass(frozen=True)
class Refits:
    """How linears are refitted, each run of the cut model beside one of the whole model.

    Attributes:
        parts: Of how many parts of the data moments are kept.
        kept: How many inputs are left to each that is refitted; by default all linears keep all.
        zeros: How many weights are zero, by name, as far as that is known.
    """

    parts: int
    kept: Mapping[str, int] | None = None
    zeros: Mapping[str, int] | None = None

    def solves(self, model: PreTrainedModel) -> int:
        """Returns the bytes that the largest refit takes beside its moments."""
        return max((self._solved(*sizes, model.dtype.itemsize) for sizes in self._sizes(model)), default=0)

    def rests(self, model: PreTrainedModel, tokens: int) -> int:
        """Returns the bytes of what may: the largest moments, and what both runs of so many tokens hold within a block.

        That is the widest inputs, what two linears fall short of, and what runs hold while they wait.
        """
        widest = max((weight_of(linear).shape[1] for linear in prunable(model).values()), default=0)
        hidden: int = text_config(model.config).hidden_size
        return self.moments(model) + 2 * tokens * ((widest + HELD * hidden) * model.dtype.itemsize + 4 * hidden)

    def moments(self, model: PreTrainedModel) -> int:
        """Returns the bytes of the largest moments, float64: of each part, half of a square, and a matrix like the weight."""
        sizes = [_half(columns) + rows * columns for rows, columns, _ in self._sizes(model)]
        return 8 * self.parts * max(sizes, default=0)

    def _sizes(self, model: PreTrainedModel) -> list[tuple[int, int, int]]:
        """Returns the outputs of each linear that is refitted, its inputs that are left, and how many of its weights are zero."""
        shapes = {name: weight_of(linear).shape for name, linear in prunable(model).items()}
        kept = {name: columns for name, (_, columns) in shapes.items()} if self.kept is None else self.kept
        zeros = {name: (self.zeros or {}).get(f"{name}.weight", 0) for name in shapes}
        return [(shapes[name][0], columns, zeros[name]) for name, columns in kept.items() if name in shapes]

    def _solved(self, rows: int, columns: int, zeros: int, itemsize: int) -> int:
        """Returns the bytes of one: float64 matrices, and the weight of the inputs that are left, as it was and as it is then.

        Half of a square to solve in, pieces of it and of what is solved for, some outputs, and mixtures of them for each part.
        Where weights stay zero, a whole square, and what conjugate gradients step in, for some outputs. And sums of each part.
        """
        few = (self.parts + 1 if rows > OUTPUTS else 1) * min(rows, OUTPUTS)
        pieces = min(ROWS, columns) * (min(ROWS, columns) + min(rows, OUTPUTS))
        square = _half(columns) + pieces + few * columns
        if is_pruned(zeros, rows * columns):
            square = max(square, columns**2 + max(_half(columns), STEPPED * min(rows, OUTPUTS) * columns))
        return 8 * (square + (self.parts + 1) * (rows + columns)) + 2 * itemsize * rows * columns


class Matches(Refits):
    """How blocks are matched, each run of the pruned model beside one of the dense model."""

    def solves(self, model: PreTrainedModel) -> int:
        """Returns the bytes that tuning the largest block takes, without what a batch leaves for its gradients."""
        stream = stream_of(model)
        return 0 if stream is None else TUNED * 4 * extent_of(stream).largest // model.dtype.itemsize

    def moments(self, _: PreTrainedModel) -> int:
        """Returns none: blocks are matched by gradients."""
        return 0


def _half(columns: int) -> int:
    """Returns the numbers in the panels of half of a square."""
    return columns * (columns + min(ROWS, columns)) // 2


def left(search: Search, cut: Cut) -> dict[str, int]:
    """Returns how many inputs a cut leaves to each module that reads units; if scores decide how many, all of them."""
    lasts = search.amount.ranking == "layer"
    return {
        reader: len(one.index) * cut.after[name][0] // cut.before[name][0] if lasts else len(one.index)
        for name, one in search.units.items()
        if name in cut.units
        for reader in one.readers
    }


def rest(
    model: PreTrainedModel, given: Text, out: str, shown: int, measured: int, moments: int, refits: Refits | None = None
) -> str | None:
    """Has what blocks hand on, and predictions to compare with, rest in files where memory is limited and too small for it.

    Args:
        model: The model, which is streamed.
        given: It says how much memory there is.
        out: The folder that is written; files rest beside it.
        shown: Examples that are shown.
        measured: Examples that are measured on.
        moments: Bytes of the largest statistics, with what is made of them.
        refits: How linears are refitted, if they are.

    Returns:
        The folder in which the files are; None for memory.
    """
    stream, memory = stream_of(model), memory_of("memory", given.memory or "")
    assert stream is not None, "memory is limited of a model that is streamed alone"
    give_back()
    length, text = given.length_for(model), text_config(model.config)
    logits, refit, within = 4 * length * text.vocab_size, 0, 0
    between = 2 * max(shown, measured) * length * text.hidden_size * model.dtype.itemsize  # what goes into a block, and comes out
    if refits is not None:
        refit, within = refits.solves(model), refits.rests(model, shown * length)
    rests = max(between, within) + min(PREDICTIONS, measured * logits)
    if not fits(model, moments + given.batch_size * logits, refit, rests, memory):
        stream.rests = str(Path(out).resolve().parent)
    return stream.rests


def reads(stream: Stream, passes: int, exactly: bool = True, beside: Sequence[object] = ()) -> str:
    """Says how many bytes are read and written, if so many passes, or as many at most, change and measure the blocks.

    What is named in `beside` reads them besides, nobody knows how often.
    """
    extent, passes = extent_of(stream), passes + AFTERWARDS
    read, written = (f"{size / 1e6:,.1f} MB" for size in (passes * extent.bytes, extent.bytes + extent.stays))
    most = "" if exactly else "at most "
    own = f", and as often as {' and '.join(map(str, beside))} needs" if beside else ""
    return f"read {extent.blocks} blocks from files in {most}{passes} passes, {read}{own}, and write {written}"
