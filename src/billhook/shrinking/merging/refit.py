"""Refits what reads heads that merge, each attention alone, to what it gave before, as readers of removed heads are refitted.

Each attention runs once more for each of its variants, beside itself, up to the linear that reads its heads; what it hands on is
the dense model's, so that all attentions are seen in one run of each batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.state import overridden, precisely, replaced, undisturbed
from billhook.engine.walk import spare
from billhook.kv_heads.bases.stacks import Projections
from billhook.linalg import float64_device
from billhook.model.linears import as_it_lies, matrix_of, size_of, turned
from billhook.repairs.enough import counting
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.moments import OwedMoments, folds_of, wide
from billhook.repairs.repair import Repair
from billhook.shrinking.library import resting


def refit_readers(
    model: nn.Module,
    places: Mapping[str, Projections],
    variants: Mapping[str, Mapping[int, LazyTensors]],
    runs: Sequence[Run],
    repair: Repair,
) -> dict[str, dict[int, LazyTensors]]:
    """Returns new parameters of the linears that read heads, by attention and number of KV heads; the model stays as it is.

    Args:
        model: The model.
        places: Where projections lie, by attention.
        variants: By attention and number of KV heads, the parameters with which the heads of each group are equal.
        runs: Batches, two at least; each source is held out in turn, or some batches where there is one source.
        repair: How linears are refitted, by its ridges and held-out share.
    """
    parts, held_out = repair.parts([run.source for run in runs])
    every = {name: _Beside(model, place, variants[name], max(parts) + 1) for name, place in places.items()}
    with undisturbed(model), ExitStack() as stack:
        for one in every.values():
            stack.enter_context(one.listening())
        for run, part in zip(runs, parts, strict=True):
            for one in every.values():
                one.run, one.part = run, part
            run.visit()
    return {name: one.refitted(held_out, repair.ridges) for name, one in every.items()}


class _Enough(BaseException):
    """Ends an attention's forward at the linear that reads the heads: the rest would be for nothing."""


class _Beside:
    """Runs one attention with the parameters of each variant, and adds up what its reader is given, and owes, in each."""

    def __init__(self, model: nn.Module, place: Projections, variants: Mapping[int, LazyTensors], parts: int) -> None:
        self._model, self._place, self._variants = model, place, variants
        self._reader = model.get_submodule(place.o.linear)
        (rows, columns), device = size_of(self._reader), self._reader.get_parameter("weight").device
        self._moments = {number: [OwedMoments(rows, columns, device) for _ in range(parts)] for number in variants}
        self._given: Tensor | None = None
        self._proper = True
        self.run: Run
        self.part = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overrides the attention's forward, and listens to its reader."""
        module = self._model.get_submodule(self._place.name)
        with ExitStack() as stack:
            stack.callback(self._reader.register_forward_pre_hook(self._read).remove)
            stack.enter_context(overridden(module, forward=partial(self._visit, module.forward)))
            yield

    def refitted(self, held_out: Sequence[int], ridges: Sequence[float]) -> dict[int, LazyTensors]:
        """Returns by variant the new parameters of the reader; none where nothing can be held out."""
        return {number: self._refitted(number, held_out, ridges) for number in self._variants}

    def _refitted(self, number: int, held_out: Sequence[int], ridges: Sequence[float]) -> LazyTensors:
        parts = self._moments[number]
        weight, bias = self._own(number)
        device = float64_device(weight.device)
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
        if not (folds := folds_of(parts, held_out)):
            return LazyTensors({})
        found = as_it_lies(self._reader, *refit_linear(weight, bias, folds, parts, ridges))
        return resting(self._model, by_parameter({self._place.o.linear: found}))

    def _own(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias of the reader in a variant."""
        own = self._variants[number].of_module(self._place.o.linear)
        return turned(self._reader, own["weight"]), own.get("bias")

    def _visit(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the attention's forward with the parameters of each variant, and then as it is."""
        given, self._proper = dict[int, Tensor](), False
        for number, weights in self._variants.items():
            own = {self._model.get_submodule(linear): weights.of_module(linear) for linear in weights.modules}
            with replaced(own), suppress(_Enough):  # the block is here, and stays
                forward(*map(spare, args), **{name: spare(value) for name, value in kwargs.items()})
            given[number] = self._taken()
        self._proper = True
        output = forward(*args, **kwargs)
        self._add(given, self._taken())
        return output

    def _read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._given = args[0].detach()
        if not self._proper:
            raise _Enough

    def _taken(self) -> Tensor:
        """Returns what the reader was given last."""
        given, self._given = self._given, None
        if given is None:
            raise ValueError(f"{self._place.name} does not run {self._place.o.linear}")
        return given

    def _add(self, given: Mapping[int, Tensor], dense: Tensor) -> None:
        """Adds what the reader owes in each variant: what it gives in the dense model, less what it gives then."""
        with precisely():
            keep, expected = counting(self.run, self._place.o.linear, dense), wide(dense) @ wide(matrix_of(self._reader)[0]).t()
            for number, inputs in given.items():
                owed = expected - wide(inputs) @ wide(self._own(number)[0]).t()
                self._moments[number][self.part].add(inputs, owed, keep)
