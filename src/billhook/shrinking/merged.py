"""Plans what was chosen where KV heads merge: the merging, then the units and whole blocks that go, and the weights.

What reads heads is refitted to what it gave before, as readers of removed heads are. Each attention runs once more for each of
its variants, beside itself, up to the linear that reads its heads; what it hands on is the dense model's, so that all attentions
are seen in one run of each batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.state import overridden, precisely, replaced, undisturbed
from billhook.engine.walk import spare
from billhook.kv_heads.layout import Projections
from billhook.kv_heads.methods import SVD
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.linalg import float64_device
from billhook.model.figures import figures_of
from billhook.model.linears import as_it_lies, is_linear, matrix_of, size_of, turned
from billhook.model.meta import to_meta
from billhook.model.shape import set_shape
from billhook.model.surgery import changed
from billhook.pruning.block_plan import without
from billhook.pruning.cuts import find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.moments import OwedMoments, as_float, counting, folds_of
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.blocks import Block, Blocks
from billhook.shrinking.planned import Planned, refitted_if_enough
from billhook.shrinking.variants import resting
from billhook.tracing.trace import trace
from billhook.units.find import units_of

METHOD = SVD()
"""How KV heads become one."""


def plans_of(model: PreTrainedModel, heads: Mapping[str, int]) -> tuple[list[KVHeadPlan], PreTrainedModel]:
    """Finds the plans, in turn, by which attentions come to have so many KV heads, and the model after that, on meta tensors."""
    plans, smaller = list[KVHeadPlan](), model
    for number in sorted(set(heads.values()), reverse=True):
        names = [name for name, own in heads.items() if own == number]
        plans.append(plan_kv_heads(smaller, number, METHOD, names))
        smaller = to_meta(smaller)
        set_shape(smaller, plans[-1].shape)
    return plans, smaller


@dataclass(frozen=True, eq=False)
class Merged:
    """KV heads that merge beside what goes.

    Attributes:
        search: The model, and what it costs.
        heads: By attention, how many KV heads it is to have.
        weights: The parameters with which the heads of each group are equal.
    """

    search: Search
    heads: Mapping[str, int]
    weights: LazyTensors

    def planned(
        self,
        limit: int,
        numbers: Mapping[str, list[int]],
        blocks: Blocks,
        gone: Sequence[Block],
        fitted: Sequence[Any],
        repair: RepairConfig | None,
    ) -> Planned:
        """Finds the plans, as has been tried on meta tensors, and their weights; the model stays as it is.

        What reads heads, and what feed-forwards end in, is refitted from front to back. Optimizers restart for what is in another
        basis.

        Args:
            limit: The most bytes of cache that may be left; more are refused.
            numbers: The units that go, by place; of attentions in which heads merge none does.
            blocks: The blocks that could go.
            gone: Those that do.
            fitted: Batches to fit to.
            repair: How linears are refitted; None: not at all.
        """
        numbers = {name: own for name, own in numbers.items() if name not in self.heads}
        planned = self._plans(limit, numbers, blocks, gone)
        weights = self.weights
        left = ""
        if repair is not None:
            refitted, left = self._repaired(numbers, blocks.zeros(gone), fitted, repair)
            weights = weights | refitted
        new = [name for name in changed(self.search.model, weights) if name in self.weights]
        plans = tuple(replace(plan, restart=_of(plan.layers, new)) for plan in planned.merged)
        return replace(planned, weights=weights, merged=plans, not_refitted=left)

    def _plans(self, limit: int, numbers: Mapping[str, list[int]], blocks: Blocks, gone: Sequence[Block]) -> Planned:
        plans, merged = plans_of(self.search.model, self.heads)
        structure = trace(merged)
        cut = find_cut(merged, structure, units_of(merged, structure, self.search.amount.kinds), numbers)
        smaller = tried(merged, cut)
        units, after = UnitPlan.of(cut, (figures_of(merged), figures_of(smaller))), None
        if gone:
            after = blocks.planned(smaller, gone)
            smaller = without(smaller, after)
        if (left := figures_of(smaller).kv_cache_bytes or 0) > limit:
            raise ValueError(f"kv_cache_bytes: {left:,} would be left, more than {limit:,}, as heads do not all cost the same")
        return Planned(units, after, merged=tuple(plans), dense=self.search.now.params)

    def _repaired(
        self, numbers: Mapping[str, list[int]], zeros: LazyTensors, fitted: Sequence[Any], repair: RepairConfig
    ) -> tuple[LazyTensors, str]:
        """Refits linears; those that are zero, as their block goes, stay so; says what was not refitted."""
        model, search = self.search.model, self.search
        units = UnitPlan.of(find_cut(model, search.structure, search.units, numbers))
        whole = [name for name in self._reading() if name not in zeros.modules]
        return refitted_if_enough(model, units, fitted, repair, self.weights | zeros, whole)

    def _reading(self) -> list[str]:
        """Returns the linears that read heads, and those that feed-forwards end in."""
        search = self.search
        readers = [reader for one in search.units.values() for reader in one.readers]
        downs = [part.name.rpartition(".")[0] for one in search.structure.feed_forward for part in one.down]
        return [name for name in dict.fromkeys([*readers, *downs]) if is_linear(search.model.get_submodule(name))]


def _of(layers: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Returns the parameters in some attentions."""
    return tuple(name for name in names if any(name.startswith(f"{layer}.") for layer in layers))


def refit_readers(
    model: nn.Module,
    places: Mapping[str, Projections],
    variants: Mapping[str, Mapping[int, LazyTensors]],
    runs: Sequence[Run],
    repair: RepairConfig,
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
            keep = counting(self.run, self._place.o.linear, dense)
            expected = as_float(dense) @ as_float(matrix_of(self._reader)[0]).t()
            for number, inputs in given.items():
                owed = expected - as_float(inputs) @ as_float(self._own(number)[0]).t()
                self._moments[number][self.part].add(inputs, owed, keep)
