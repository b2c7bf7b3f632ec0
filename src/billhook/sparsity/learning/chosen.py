"""Finds what the masks of linears follow from: how sparse each becomes, and statistics of its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.calibration.calibration import Batches
from billhook.engine.comm import Comm
from billhook.engine.statistics import Statistics
from billhook.engine.walk import Sequential
from billhook.model.convolutions import Convolutions
from billhook.model.linears import turned, weight_of
from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.checks import check_pruning, needing, needs_data, uncalled, warn_of_others
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.grouped import Grouped, empty_for, prune_by, scores_of
from billhook.sparsity.masks import check_amount, parse_pattern
from billhook.sparsity.visitor import PruningVisitor, naming
from billhook.sparsity.walks import Walks, runs_for, sparsities_of


@dataclass(frozen=True)
class Chosen:
    """Says what the mask of a linear follows from, beside its weight.

    Attributes:
        sparsity: Fraction of its weights that is left out.
        statistics: Of its inputs; None where the criterion needs none.
    """

    sparsity: float
    statistics: Statistics | Grouped | None

    def keep(self, name: str, linear: nn.Module, criterion: Criterion, pattern: str) -> Tensor:
        """Returns the keep-mask of a linear as it is now, bool, as its weight lies in memory."""
        with naming(name):
            _, keep = prune_by(criterion, weight_of(linear), self.statistics, self.sparsity, pattern)
        if self.statistics is not None:
            self.statistics.settle()
        return turned(linear, keep).contiguous()

    def again(self, name: str, linear: nn.Module, criterion: Criterion, pattern: str) -> Tensor:
        """Returns the mask that `keep` does, once that has checked what stays: after each step, without a host sync.

        Weights that are NaN are kept, so that the loss shows them.
        """
        kind = type(criterion)
        if kind.prune is not Criterion.prune or kind.keep is not Criterion.keep:  # a user's own choice may check what it likes
            return self.keep(name, linear, criterion, pattern)
        scores = scores_of(criterion, weight_of(linear), self.statistics)
        return turned(linear, criterion.keep(scores, self.sparsity, parse_pattern(pattern), check=False)).contiguous()

    def state(self) -> dict[str, Any]:
        """Returns it as a checkpoint holds it."""
        return {"sparsity": self.sparsity, "sums": [] if self.statistics is None else self.statistics.tensors()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], linear: nn.Module, criterion: Criterion) -> "Chosen":
        """Makes it of what a checkpoint holds."""
        if not state["sums"]:
            return cls(state["sparsity"], None)
        statistics = empty_for(criterion, linear, weight_of(linear).device)
        for own, saved in zip(statistics.tensors(), state["sums"], strict=True):
            own.copy_(saved)
        return cls(state["sparsity"], statistics)


class _Noting(PruningVisitor):
    """A visitor that notes what it prunes by."""

    def __init__(self, *given: Any, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*given, **walk)
        self.noted: dict[str, Chosen] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Prunes, and notes by what."""
        super().finish(linears)
        self.noted |= {name: Chosen(self.sparsities[name], self._statistics(name)) for name in linears}


def choose(
    model: nn.Module,
    criterion: Criterion,
    batches: Batches | None,
    sparsity: float,
    pattern: str,
    *,
    allocation: Allocation | None,
    skip: Sequence[str],
    output_embeddings: bool,
    convolutions: Convolutions,
    sequential: Sequential,
    comm: Comm,
) -> dict[str, Chosen]:
    """Finds what the masks that `prune` would make follow from, by linear; the model stays as it is. See `prune`."""
    allocation = allocation or Uniform()
    linears = check_pruning(model, criterion, pattern, sequential, allocation, skip, output_embeddings, convolutions)
    runs = runs_for(model, batches, needing(criterion, allocation), comm)
    walks = Walks(model, linears, runs, comm, None, None, {})
    warn_of_others(model, linears)
    sparsities = sparsities_of(walks, check_amount(sparsity, pattern), allocation)
    noted = walks(sequential if needs_data(criterion) else None, partial(_Noting, criterion, sparsities, pattern, None)).noted
    uncalled(linears, noted)
    return {name: noted[name] for name in linears if name in noted}
