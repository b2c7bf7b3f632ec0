"""Refits what reads merged KV heads to what it gave before, as readers of removed heads are.

Each attention runs once more for each of its candidates, beside itself, up to the linear that reads its heads; what it hands on
is the dense model's, so that all attentions are seen in one run of each batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.state import evaluating_without_grad, full_precision, overridden, replaced
from billhook.engine.walk import copy_cache
from billhook.kv_heads.layout import Projections
from billhook.kv_heads.moments import StopForward
from billhook.linalg import float64_device
from billhook.model.layers import matrix_of, size_of, to_layout, to_parameters
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import ResidualStatistics, as_float, make_folds, non_padding
from billhook.shrinking.cache import resting


def refit_readers(
    model: nn.Module,
    projections: Mapping[str, Projections],
    candidates: Mapping[str, Mapping[int, LazyTensors]],
    runs: Sequence[Run],
    repair: RepairConfig,
) -> dict[str, dict[int, LazyTensors]]:
    """Returns new parameters of the linears that read heads, by attention and number of KV heads; the model stays as it is.

    Args:
        model: The model.
        projections: Where projections lie, by attention.
        candidates: By attention and number of KV heads, the parameters with which the heads of each group are equal.
        runs: Batches, two at least; each source is held out in turn, or some batches where there is one source.
        repair: How linears are refitted, by its ridges and held-out share.
    """
    parts, held_out = repair.parts([run.source for run in runs])
    refits = {name: _ReaderRefit(model, where, candidates[name], max(parts) + 1) for name, where in projections.items()}
    with evaluating_without_grad(model), ExitStack() as stack:
        for refit in refits.values():
            stack.enter_context(refit.listening())
        for run, part in zip(runs, parts, strict=True):
            for refit in refits.values():
                refit.run, refit.part = run, part
            run.visit()
    return {name: refit.refitted(held_out, repair.ridges) for name, refit in refits.items()}


class _ReaderRefit:
    """Runs one attention with the parameters of each candidate, and adds up what its reader is given, and owes, in each."""

    run: Run
    part: int

    def __init__(self, model: nn.Module, projections: Projections, candidates: Mapping[int, LazyTensors], parts: int) -> None:
        self._model, self._projections, self._candidates = model, projections, candidates
        self._linear = projections.o.linear
        self._reader = model.get_submodule(self._linear)
        (rows, columns), device = size_of(self._reader), self._reader.get_parameter("weight").device
        self._moments = {number: [ResidualStatistics(rows, columns, device) for _ in range(parts)] for number in candidates}
        self._inputs: Tensor | None = None
        self._stops = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overrides the attention's forward, and listens to its reader."""
        attention = self._model.get_submodule(self._projections.name)
        with ExitStack() as stack:
            stack.callback(self._reader.register_forward_pre_hook(self._read).remove)
            stack.enter_context(overridden(attention, forward=partial(self._visit, attention.forward)))
            yield

    def refitted(self, held_out: Sequence[int], ridges: Sequence[float]) -> dict[int, LazyTensors]:
        """Returns by candidate the new parameters of the reader; none where nothing can be held out."""
        refitted = dict[int, LazyTensors]()
        for number, parts in self._moments.items():
            weight, bias = self._parameters(number)
            device = float64_device(weight.device)  # the CPU where the device has no float64
            weight, bias = weight.to(device), None if bias is None else bias.to(device)
            new = dict[str, Tensor]()
            if folds := make_folds(parts, held_out):
                tensors = to_parameters(self._reader, *refit_linear(weight, bias, folds, parts, ridges))
                new = by_parameter({self._linear: tensors})
            refitted[number] = resting(self._model, new) if new else LazyTensors({})
        return refitted

    def _parameters(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias of the reader in a candidate."""
        parameters = self._candidates[number].of_module(self._linear)
        return to_layout(self._reader, parameters["weight"]), parameters.get("bias")

    def _visit(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the attention's forward with the parameters of each candidate, and then as it is."""
        inputs = dict[int, Tensor]()
        for number, weights in self._candidates.items():
            parameters = {self._model.get_submodule(linear): weights.of_module(linear) for linear in weights.modules}
            self._stops = True
            with replaced(parameters), suppress(StopForward):  # the block is here, and stays
                forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
            inputs[number] = self._taken()
        self._stops = False
        output = forward(*args, **kwargs)
        self._add(inputs, self._taken())
        return output

    def _read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs = args[0].detach()
        if self._stops:
            raise StopForward

    def _taken(self) -> Tensor:
        """Returns what the reader was given last."""
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ValueError(f"{self._projections.name} does not run {self._linear}")
        return inputs

    def _add(self, inputs: Mapping[int, Tensor], dense: Tensor) -> None:
        """Adds what the reader owes in each candidate: what it gives in the dense model, less what it gives then."""
        with full_precision():
            keep, expected = (
                non_padding(self.run, self._linear, dense),
                as_float(dense) @ as_float(matrix_of(self._reader)[0]).t(),
            )
            for number, read in inputs.items():
                owed = expected - as_float(read) @ as_float(self._parameters(number)[0]).t()
                self._moments[number][self.part].add(read, owed, keep)
