"""Refits the consumer layers of pooled KV heads to their dense outputs.

Each attention module also runs once for each of its variants, up to the consumer layer of its heads. Its output stays the dense
model's, so one run of each batch covers all attention modules.
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
from billhook.repairs.residuals import ResidualStatistics, as_float, can_choose, non_padding
from billhook.shrinking.variants import staged


def refit_consumers(
    model: nn.Module,
    projections: Mapping[str, Projections],
    variants: Mapping[str, Mapping[int, LazyTensors]],
    runs: Sequence[Run],
    repair: RepairConfig,
) -> dict[str, dict[int, LazyTensors]]:
    """Returns new parameters of the consumer layers, by module and number of KV heads.

    Args:
        model: The model; it stays unchanged.
        projections: The projections, by attention module.
        variants: By attention module and number of KV heads, the parameters with equal heads in each group.
        runs: Batches, at least two, some of which are held out.
        repair: Ridge penalties and held-out fraction of the refits.
    """
    parts = repair.parts(len(runs))
    refits = {}
    with evaluating_without_grad(model), ExitStack() as stack:
        for name, of_attention in projections.items():
            refits[name] = _PooledConsumerRefit(model, of_attention, variants[name])
            stack.enter_context(refits[name].listening())
        for run, part in zip(runs, parts, strict=True):
            for refit in refits.values():
                refit.run, refit.part = run, part
            run.visit()
    return {name: refit.refitted(repair.ridges) for name, refit in refits.items()}


class _PooledConsumerRefit:
    """Runs an attention module with each variant, and sums the residual errors."""

    run: Run
    part: int

    def __init__(self, model: nn.Module, projections: Projections, variants: Mapping[int, LazyTensors]) -> None:
        self._model, self._projections, self._candidates = model, projections, variants
        self._linear = projections.o.linear
        self._reader = model.get_submodule(self._linear)
        (rows, columns), device = size_of(self._reader), self._reader.get_parameter("weight").device
        self._moments = {number: [ResidualStatistics(rows, columns, device) for _ in range(2)] for number in variants}
        self._inputs: Tensor | None = None
        self._stops = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overrides the forward pass of the attention module, and hooks its consumer layer."""
        attention = self._model.get_submodule(self._projections.name)
        with ExitStack() as stack:
            stack.callback(self._reader.register_forward_pre_hook(self._read).remove)
            stack.enter_context(overridden(attention, forward=partial(self._visit, attention.forward)))
            yield

    def refitted(self, ridges: Sequence[float]) -> dict[int, LazyTensors]:
        """Returns by variant the new parameters of the consumer layer.

        Empty if nothing can be held out.
        """
        refitted = {}
        for number, parts in self._moments.items():
            weight, bias = self._parameters(number)
            device = float64_device(weight.device)  # the CPU where the device has no float64
            weight, bias = weight.to(device), None if bias is None else bias.to(device)
            new = {}
            if can_choose(parts):
                tensors = to_parameters(self._reader, *refit_linear(weight, bias, parts, ridges))
                new = by_parameter({self._linear: tensors})
            refitted[number] = staged(self._model, new) if new else LazyTensors({})
        return refitted

    def _parameters(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias of the consumer layer in a variant."""
        parameters = self._candidates[number].of_module(self._linear)
        return to_layout(self._reader, parameters["weight"]), parameters.get("bias")

    def _visit(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the forward pass with each variant's parameters, and then unchanged."""
        inputs = {}
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
        """Returns the last inputs of the consumer layer."""
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ValueError(f"{self._projections.name} does not call {self._linear}")
        return inputs

    def _add(self, inputs: Mapping[int, Tensor], dense: Tensor) -> None:
        """Adds the residual error of each variant: the dense output minus the variant's output."""
        with full_precision():
            keep, expected = (
                non_padding(self.run, self._linear, dense),
                as_float(dense) @ as_float(matrix_of(self._reader)[0]).t(),
            )
            for number, read in inputs.items():
                owed = expected - as_float(read) @ as_float(self._parameters(number)[0]).t()
                self._moments[number][self.part].add(read, owed, keep)
