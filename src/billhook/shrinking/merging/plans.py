"""Plans what was chosen where KV heads merge: the merging, then the units and whole blocks that go, and the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.methods.svd import SVD
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model.figures import figures_of
from billhook.model.linears import is_linear
from billhook.model.meta import to_meta
from billhook.model.shapes.shape import set_shape
from billhook.model.surgery import changed
from billhook.pruning.block_plan import without
from billhook.pruning.cuts import find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.removal import tried
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.shrinking.spaces.blocks import Block, Blocks
from billhook.shrinking.spaces.planned import Planned, refitted_if_enough
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
        repair: Repair | None,
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
        self, numbers: Mapping[str, list[int]], zeros: LazyTensors, fitted: Sequence[Any], repair: Repair
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
