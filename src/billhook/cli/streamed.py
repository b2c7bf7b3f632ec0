"""Streamed models in one-shot commands: limits, number of passes, and memory estimates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from billhook.calibration.generated import GENERATED
from billhook.cli.examples import TextOptions
from billhook.engine import BlockStore, store_of, streamed_size
from billhook.importance.ablation import Ablation
from billhook.importance.activations import ActivationNorm, OutputNorm
from billhook.importance.baselines import RandomUnits, WeightNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.obs import OBS
from billhook.importance.reap import REAP, GateMass, RoutingFrequency
from billhook.importance.score import Importance, check_supports_streaming
from billhook.model import prunable, weight_of
from billhook.pruning.repair import RepairOption
from billhook.repairs.matching import BlockMatching
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import MAX_OUTPUTS
from billhook.sparsity.criteria import Criterion

ZEROS_PASSES = 2
"""Passes that compare the model without some blocks with the one in which their output layers are zero."""
REMOVE_PASSES = 3
"""Passes that mask units, remove them, and compare the results."""
BLOCK_PASSES = 12
"""Passes that compare the model without some blocks, also with a KV cache, when planning and when applying."""
SAVE_PASSES = 3
"""Passes that count zeros, compute the expected logits, and verify the checkpoint."""

TUNED_COPIES = 6
"""Float32 copies of a block during reconstruction: weights, gradient, Adam's two moments, the best and the old weights."""
SOLVER_COPIES = 8
"""Matrices of the size of a slice of weight rows in a refit: six of conjugate gradients, the residual, and mixtures of it."""
OBS_BYTES = 4 + 8
"""Bytes per pair of inputs in OBS: a float32 and a float64 matrix."""


def matching_of(repair: RepairOption) -> BlockMatching | None:
    """Returns the settings of block-wise reconstruction after a repair, if any."""
    return repair.match if isinstance(repair, RepairConfig) else None


def repair_passes(repair: RepairOption) -> int:
    """Returns the number of passes that find, refit, and match layers."""
    return 0 if repair is None else 2 + (matching_of(repair) is not None)


def batch_count(example_counts: Iterable[int], batch_size: int) -> int:
    """Returns the number of batches, given the number of examples of each source.

    >>> batch_count([20, 5], 8)
    4
    """
    return sum(-(-count // batch_size) for count in example_counts)


@dataclass
class Passes:
    """Number of passes over a streamed model until units are removed.

    Attributes:
        known: Number of passes that are known in advance.
        unknown: Custom importances, which need an unknown number of further passes.
    """

    known: int = 0
    unknown: list[Importance] = field(default_factory=list)

    def add_scoring(self, rounds: int, importance: Importance, units: int, batches: int) -> None:
        """Adds the maximum number of passes of an importance that scores units in each round.

        Args:
            rounds: Number of rounds.
            importance: Scores the units.
            units: Number of units.
            batches: Number of batches.
        """
        known = {
            OutputNorm: 2,  # the first finds the consumer layers
            ActivationNorm: 1,
            REAP: 1,
            RoutingFrequency: 1,
            GateMass: 1,
            BlockInfluence: 1,
            Ablation: (1 + units) * batches,
            WeightNorm: 1,
            RandomUnits: 0,
        }
        passes = importance.passes if isinstance(importance, OBS) else known.get(type(importance))
        if passes is not None:
            self.known += rounds * passes
        elif importance not in self.unknown:
            self.unknown.append(importance)


def check_streamed(options: TextOptions, streams: bool, offload: bool) -> None:
    """Raises if a command cannot run on a streamed model.

    Args:
        options: Data options of the command.
        streams: True if the command supports streamed models.
        offload: Option of the command.
    """
    if not streams:
        raise ValueError("stream=True is not supported by this command, which needs gradients or all weights. Remove --stream.")
    if offload:
        raise ValueError("offload=True keeps the model in memory and cannot be combined with stream=True. Use one of them.")
    sources = options.data if isinstance(options.data, list) else [options.data]
    if GENERATED in sources:
        raise ValueError(
            f"data={options.data!r} is not supported with stream=True: to generate text, a streamed model would be read once per "
            "token. Remove it from --data."
        )


def check_scored(options: TextOptions, *importances: Importance | None) -> None:
    """Raises if a streamed model is to be scored with gradients, before any weights are read."""
    for importance in importances if options.stream else ():
        if importance is not None:
            check_supports_streaming(importance)


def statistics_bytes(model: PreTrainedModel, scorer: Criterion | Importance | None) -> int:
    """Returns the bytes of the largest statistics of a linear layer, with derived matrices."""
    largest = 0
    for layer in prunable(model).values():
        columns = weight_of(layer).shape[1]
        if isinstance(scorer, OBS):
            largest = max(largest, OBS_BYTES * columns**2)
        elif isinstance(scorer, Criterion) and (statistics := scorer.statistics(columns, "meta")) is not None:
            largest = max(largest, scorer.copies * sum(tensor.nbytes for tensor in statistics.tensors()))
    return largest


def refit_bytes(model: PreTrainedModel, repair: RepairOption, kept: Mapping[str, int] | None = None) -> tuple[int, int]:
    """Returns the bytes of the largest refit, and of its Gram matrices (spillable).

    Args:
        model: The model.
        repair: The repair; None needs no bytes.
        kept: Number of inputs that each refitted linear layer keeps. Defaults to all inputs of all layers.
    """
    largest_refit = largest_gram = 0
    if matching_of(repair) is not None:
        largest_refit = reconstruction_bytes(model)
    for name, layer in prunable(model).items() if repair is not None else ():
        rows, columns = weight_of(layer).shape
        if kept is not None:
            columns = kept.get(name, 0)
        weights = 2 * model.dtype.itemsize * rows * columns  # the old and the new weight
        largest_refit = max(largest_refit, 8 * columns * (columns + SOLVER_COPIES * min(rows, MAX_OUTPUTS)) + weights)
        largest_gram = max(largest_gram, 8 * 2 * columns * (columns + rows))
    return largest_refit, largest_gram


def reconstruction_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes for tuning the largest block, without the activations of a batch."""
    return TUNED_COPIES * 4 * streamed_size(store_of(model)).largest // model.dtype.itemsize


def io_summary(store: BlockStore, passes: int, exact: bool, unknown: Sequence[object]) -> str:
    """Returns a line on the bytes that a command reads and writes.

    Args:
        store: The model on disk.
        passes: Number of passes until the model is saved.
        exact: If False, `passes` is an upper bound.
        unknown: Importances that need an unknown number of further passes.
    """
    extent, passes = streamed_size(store), passes + SAVE_PASSES
    at_most = "" if exact else "at most "
    more = f", plus the passes of {' and '.join(map(str, unknown))}" if unknown else ""
    read, written = passes * extent.bytes / 1e6, (extent.bytes + extent.stays) / 1e6
    return f"stream {extent.blocks} blocks in {at_most}{passes} passes{more} (read {read:,.1f} MB, write {written:,.1f} MB)"
