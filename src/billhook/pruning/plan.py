"""Plans of units to remove from a model."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.arguments import check_one_of
from billhook.display import text_table
from billhook.engine import LazyTensors, store_of
from billhook.importance.routing import RoutingChange
from billhook.linalg import IndicesByModule
from billhook.model import Costs, ShapePlan, UpdateOptimizers, Weights, find_transformer, update_optimizers, with_weights
from billhook.pruning.amount import divides_among_devices
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.removal import remove
from billhook.tracing.show import name_pattern
from billhook.tracing.trace import trace
from billhook.units import PLURAL, UnitKind, UnitNumbers, counts, units_of
from billhook.vocabulary.tokenizer import Vocabulary


@dataclass(frozen=True, eq=False, repr=False)
class UnitPlan(Cut, ShapePlan):
    """A plan to remove heads, channels, hidden dimensions, or experts; `print` shows a table."""

    kind = "units"
    costs: tuple[Costs, Costs] | None = None
    widths: tuple[str, ...] = ()
    routing: tuple[RoutingChange, ...] = ()

    @classmethod
    def of(
        cls,
        cut: Cut,
        costs: tuple[Costs, Costs] | None = None,
        widths: tuple[str, ...] = (),
        routing: tuple[RoutingChange, ...] = (),
    ) -> Self:
        """Returns the plan of a cut, with notes on widths and on the routing of tokens."""
        return cls(**vars(cut), costs=costs, widths=widths, routing=routing)

    @property
    def words(self) -> str:
        """The number of units of each kind to remove, in words."""
        numbers: dict[UnitKind, list[int]] = {}
        for name, removed in self.units.items():
            numbers.setdefault(self.kinds[name], []).append(len(removed))
        words = []
        for kind in dict.fromkeys(self.kinds.values()):
            if kind in numbers:
                count, module = len(numbers[kind]), "attention module" if kind == "head" else "module"
                where = f" in {count:,} {module}{'s' * (count != 1)}"
                is_single = kind in ("residual", "token") and count == 1
                total = sum(numbers[kind])
                units = PLURAL[kind].removesuffix("s") if total == 1 else PLURAL[kind]
                words.append(f"{total:,} {units}{'' if is_single else where}")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; see `ModelPlan.to_json`."""
        return {
            "kind": self.kind,
            "model": self.model,
            "kinds": dict(self.kinds),
            "units": _as_lists(self.units),
            "before": _as_lists(self.before),
            **({"by_expert": {name: lost.tolist() for name, lost in self.by_expert.items()}} if self.by_expert else {}),
            **({"routing": [asdict(change) for change in self.routing]} if self.routing else {}),
        }

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            kinds, units = dict(plain["kinds"]), {name: list(numbers) for name, numbers in plain["units"].items()}
            routing = tuple(RoutingChange(**change) for change in plain.get("routing", ()))
            by_expert = {name: np.array(lost, dtype=np.int64) for name, lost in plain.get("by_expert", {}).items()}
            made_for, before = plain["model"], {name: tuple(numbers) for name, numbers in plain["before"].items()}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"plan must be a mapping with model, kinds, units, before ({cause}). Pass the output of to_json."
            ) from error
        for kind in kinds.values():
            check_one_of("plan: kind", kind, UnitKind)
        return cls.of(_find_again(made_for, kinds, before, units, by_expert, find_transformer(model)), routing=routing)

    def check_made_for(self, model: nn.Module) -> None:
        """Raises if the plan was made for another model; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        cuts_now = _find_again(self.model, self.kinds, self.before, self.units, self.by_expert, subject).cuts
        same_tensors = cuts_now.keys() == self.cuts.keys()
        if not same_tensors or any(not np.array_equal(kept, cuts_now[key]) for key, kept in self.cuts.items()):
            raise ValueError(
                f"plan: it was made for a {self.model} with other units than this {type(subject).__name__} has (different tensor "
                "positions). Make a new plan."
            )

    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Removes the units; see `ShapePlan.change`."""
        subject = find_transformer(model)
        check_kinds(subject, self.kinds.values())
        with with_weights(subject, weights):
            return partial(update_optimizers, remove(subject, self, lambda: LazyTensors.of(weights or {}).key))

    def trim_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Returns a tokenizer without the tokens to remove; the same one if there are none.

        Any text that could be encoded still can, in more tokens. A text without removed tokens is encoded as before.

        Raises:
            ValueError: If the tokenizer has more tokens than the model had, is written in Python, or is of another kind than
                byte-pair encoding, unigram, or WordPiece. Also if the plan removes a byte, a single character that nothing else
                spells, a special token, or a part of a token that stays.
        """
        if self.tokens is None:
            return tokenizer
        kept, size = self.tokens
        vocabulary = Vocabulary(tokenizer)
        vocabulary.check_within(size)
        return vocabulary.without(kept)

    def _renderables(self) -> list[RenderableType]:
        modules_of: dict[tuple[str, str], list[str]] = {}
        num_rows = Counter[str]()
        for name, kind in self.kinds.items():
            by_number = kind == "head" and name in self.units
            row = name if by_number else _pattern(name), self._change(name)
            num_rows[_pattern(name)] += row not in modules_of
            modules_of.setdefault(row, []).append(name)
        rows = []
        for (row_name, change), names in modules_of.items():
            layer, where = row_name, ""
            if len(names) == 1:
                layer = names[0] or "the model"
            else:
                star = row_name.split(".").index("*")
                numbers = f": {', '.join(name.split('.')[star] for name in names)}" if num_rows[_pattern(row_name)] > 1 else ""
                where = f" in each of {len(names)}{numbers}"
            rows.append((layer, f"{change}{where}"))
        costs = [("parameters", *self.parameters)]
        if self.costs:
            now, then = self.costs
            flops, cache = f"FLOPs per {'token' if now.context else 'image'}", f"KV-cache bytes per token in {now.dtype}"
            for label, name in {flops: "flops", cache: "kv_cache_bytes", "bytes": "bytes"}.items():
                if getattr(then, name):
                    costs.append((label, getattr(now, name), getattr(then, name)))
        lines = [f"{before:,} -> {after:,} {label} ({1 - after / before:.1%} fewer)" for label, before, after in costs]
        kv_heads = set()
        for name in self.units:
            if self.kinds[name] == "head" and self.after[name][1] < self.before[name][1]:
                kv_heads.add(self.after[name][1])
        lines += self.widths
        for number in sorted(kv_heads):
            if not divides_among_devices(number):
                lines.append(f"{number} KV heads cannot be divided among 2, 4, and 8 devices; 1, 2, 4, or a multiple of 8 can")
        notes, count = [Padding.indent(Text(line), 2) for line in lines[1:]], len(costs) - 1
        routing = []
        for source in self.routing:
            agreement = "" if source.agreement is None else f"{source.agreement:.1%}"
            cells = f"{source.gate_mass:.1%}", f"{source.orphans:.2%}", f"{source.unreached:,}", agreement
            routing.append((source.source or "all data", *cells))
        head = ("routing", "gates kept", "tokens without experts", "experts without tokens", "same choice in halves")
        table = [text_table(routing, head, indent=2)] if self.routing else []
        return [f"{self.model}: {lines[0]}", *notes[:count], text_table(rows, aligns="<", indent=2), *table, *notes[count:]]

    def _change(self, name: str) -> str:
        """Describes the change of a module: head numbers, or counts of other units."""
        kind, before, after, removed = self.kinds[name], self.before[name], self.after[name], self.units.get(name, [])
        if kind != "head":
            return f"{before[0]:,} -> {after[0]:,} {PLURAL[kind]}" if removed else f"{before[0]:,} {PLURAL[kind]}"
        query, kv = before
        if not removed:
            return f"{query} query, {kv} KV heads" if kv != query else f"{query} heads"
        after_text = "{} query, {} KV".format(*after) if kv != query else f"{after[0]}"
        return f"{query} -> {after_text} heads; without {', '.join(map(str, removed))}"


def _as_lists(numbers_of: Mapping[str, Collection[int]]) -> dict[str, list[int]]:
    return {name: list(numbers) for name, numbers in numbers_of.items()}


def _find_again(
    made_for: str,
    kinds: Mapping[str, UnitKind],
    before: Mapping[str, tuple[int, ...]],
    units: UnitNumbers,
    by_expert: IndicesByModule,
    model: nn.Module,
) -> Cut:
    """Finds the cut of a stored plan in a model, and raises if the units differ."""
    structure = trace(model)
    layers = units_of(model, structure, dict.fromkeys(kinds.values()))
    counts_here = {name: counts(layer) for name, layer in layers.items()}
    if made_for == type(model).__name__ and before == counts_here:
        return find_cut(model, structure, layers, units, by_expert=by_expert)
    differs = "another class"
    for name in [*before, *counts_here]:
        if before.get(name) != counts_here.get(name):
            in_plan, now = (" and ".join(map(str, numbers.get(name, ["none"]))) for numbers in (before, counts_here))
            differs = f"{name or 'the model'}: {in_plan} then, {now} now"
            break
    raise ValueError(
        f"plan: it was made for a {made_for} with other units than this {type(model).__name__} has ({differs}). Make a new plan."
    )


def _pattern(name: str) -> str:
    return name_pattern(f"{name}.").strip(". ") or "the model"


def check_kinds(model: nn.Module, kinds: Collection[UnitKind]) -> None:
    """Raises for units that a streamed model cannot lose, or not together.

    The check of heads and channels needs a second copy of the model, without the hidden dimensions, which files do not hold.
    """
    if set(kinds) - {"expert", "block"}:
        store_of(model).check_writes_values()
    if "residual" in kinds and {"head", "channel"} & set(kinds):
        store_of(model).check_can_hold_all("residual is combined with heads or channels", ", or remove them one after the other")
