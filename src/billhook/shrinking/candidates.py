"""The first stage of a search: what may be removed from a model within a budget, and how much of it may be tried."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from billhook.arguments import percentage_hint
from billhook.model.layers import matrix_of
from billhook.pruning.amount import Amount
from billhook.pruning.target import RatioSearch
from billhook.shrinking.blocks import Blocks, find_blocks
from billhook.shrinking.layers import Layer, find_layers
from billhook.shrinking.shrunk import in_words
from billhook.shrinking.space import SEVERAL, coarser, just_met

CURVE = 9
"""How many sizes the curve shows."""


@dataclass(eq=False)
class Progress:
    """Says how far a search is.

    Attributes:
        report: Called with how many steps are done, and of how many at most.
        entered: Called with what is done from now on, in words.
        reused: Called with how many candidates a folder holds from an earlier search.
        steps: How many steps there are at most.
        done: How many are done.
    """

    report: Callable[[int, int], None] | None = None
    entered: Callable[[str], None] | None = None
    reused: Callable[[int], None] | None = None
    steps: int = 0
    done: int = 0

    def enter(self, phase: str) -> None:
        """Says what is done from now on, beside how many steps are done."""
        if self.entered is not None:
            self.entered(phase)
        self.advance(0)

    def advance(self, steps: int = 1) -> None:
        """Counts steps as done."""
        self.done += steps
        if self.report is not None:
            self.report(min(self.done, self.steps), self.steps)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The layers, blocks and units that a search may remove from a model, within its limit.

    Attributes:
        search: The model, its units, and what it costs.
        target: What the budget limits.
        now: What there is of it now.
        limit: The most that may be left of it.
        uniform: Whether all layers of one kind and size keep as many units.
        layers: The layers that may keep less, each with its configs.
        blocks: The whole blocks that may go.
    """

    search: RatioSearch
    target: str
    now: int
    limit: int
    uniform: bool
    layers: list[Layer]
    blocks: Blocks

    @classmethod
    def find(cls, model: PreTrainedModel, amount: Amount, uniform: bool) -> "Candidates":
        """Finds what may go; refuses a budget that cannot be reached."""
        search, target = RatioSearch(model, amount), amount.target or ""
        limit, now = search.limit(target), int(getattr(search.now, target))
        layers = find_layers(search, target, uniform)
        candidates = cls(search, target, now, limit, uniform, layers, find_blocks(search, target, layers))
        return candidates.with_configs(getattr(amount, target))

    def with_configs(self, budget: float) -> "Candidates":
        """Returns the same layers with configs that suit the limit; refuses a budget that none of them reach."""
        candidates = replace(self, layers=[replace(layer, configs=layer.grid()) for layer in self.layers])
        if candidates.least > self.limit:
            limit, least, now = (in_words(self.target, number) for number in (self.limit, candidates.least, self.now))
            limit += " ms" * (self.target == "latency")
            raise ValueError(
                f"{self.target}={budget}: {limit} cannot be reached; with what may be removed, {least} to {now} can"
                f"{percentage_hint(budget)}"
            )
        met = just_met(candidates.layers, self.blocks.able, self.now, self.limit) if self.uniform else {}
        layers = list[Layer]()
        for layer in candidates.layers:
            more = [self.rounded({layer.name: number})[layer.name] for number in met.get(layer.name, ())]
            layers.append(replace(layer, configs=tuple(sorted({*layer.configs, *more}, reverse=True))))
        return replace(self, layers=layers)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.search.model

    @property
    def least(self) -> int:
        """The least that may be left: without all blocks that may go, and all other layers at their lowest."""
        saved = {layer.name: layer.saves(layer.configs[-1]) for layer in self.layers}
        more = (max(block.cost - sum(saved[name] for name in block.layers), 0) for block in self.blocks.able)
        return self.now - sum(saved.values()) - sum(more)

    @property
    def widest(self) -> int:
        """How many inputs the widest linear has that reads units of a layer."""
        units = [self.search.units[name] for layer in self.layers for name in layer.names]
        return max(matrix_of(self.model.get_submodule(reader))[0].shape[1] for one in units for reader in one.readers)

    def most_steps(self, generations: int, children: int) -> int:
        """Returns how many steps a search has at most."""
        measured = sum(2 + bool(layer.merges) for layer in self.layers) + len(self.blocks.able)
        return measured + len(SEVERAL) + 2 + generations * children + CURVE

    def rounded(self, kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
        """Rounds numbers of channels down, where layers stay alike and that is left to us."""
        left_to_us = self.uniform and self.search.amount.round_to == "auto"
        return coarser(self.layers, kept, spare) if left_to_us else dict(kept)
