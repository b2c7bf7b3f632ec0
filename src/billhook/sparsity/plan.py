"""The plan of a pruning of weights: the results of all linears."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from billhook.engine.fingerprint import fingerprint
from billhook.engine.lazy import LazyTensors
from billhook.engine.sharding import reshard
from billhook.engine.store import store_of
from billhook.html import html_table
from billhook.model.linears import in_place, prunable, size_of, turned
from billhook.model.plan import Plan, Weights, starting_from
from billhook.sparsity.pruned import Pruned, put


@dataclass(frozen=True, eq=False, repr=False)
class WeightPlan(Plan):
    """Which weights of a model become zero, and the new values of the others where a criterion changes them.

    Attributes:
        kind: `"weights"`.
        model: The name of the model's class; only shown, as it is another one where a model is sharded.
        criterion: The criterion that chose them, in words.
        pattern: `"unstructured"` or `"N:M"`.
        pruned: The results by linear, which lie in memory; of a model that is sharded, in shards of all ranks; of one that is
            streamed and has been pruned, in files until it is saved.
        shapes: Of each linear's weight, `[out_features, in_features]`.
        uncalled: Linears that stay as they are, as no batch has called them.
    """

    kind: ClassVar[str] = "weights"
    model: str
    criterion: str
    pattern: str
    pruned: Mapping[str, Pruned]
    shapes: Mapping[str, tuple[int, ...]]
    uncalled: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of all linears that is removed."""
        total = sum(math.prod(self.shapes[name]) for name in self.pruned)
        return 1 - sum(one.kept for one in self.pruned.values()) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data: a bit for each weight, and the values that change, in base 64.

        If the model was sharded, all ranks call this together.
        """
        pruned = {name: {"shape": list(self.shapes[name]), **one.to_json()} for name, one in self.pruned.items()}
        names = {"kind": self.kind, "model": self.model, "criterion": self.criterion, "pattern": self.pattern}
        uncalled = {name: list(self.shapes[name]) for name in self.uncalled}
        return names | {"pruned": pruned, "uncalled": uncalled}

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            kind, criterion, pattern = (str(plain[name]) for name in ("model", "criterion", "pattern"))
            shapes = {name: tuple(map(int, one["shape"])) for name, one in plain["pruned"].items()}
            pruned = {name: Pruned.from_json(one, math.prod(shapes[name])) for name, one in plain["pruned"].items()}
            uncalled = {name: tuple(map(int, shape)) for name, shape in plain["uncalled"].items()}
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan: it is not as WeightPlan.to_json makes it ({type(error).__name__}: {error})") from error
        plan = cls(kind, criterion, pattern, pruned, shapes | uncalled, tuple(uncalled))
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that lacks one of the linears, or has it in another size."""
        self._linears(model)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the keep-masks, bool, each as its weight lies in memory, and sharded as it is."""
        linears = self._linears(model)
        return {name: turned(linears[name], one.mask(in_place(linears[name]))) for name, one in self.pruned.items()}

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Changes the weights, in place; what is wrong with plan or model is refused before anything changes.

        An interrupt from the keyboard is raised before the first weight has changed, or after the last. Of a model that is
        streamed, blocks are written one by one, and the checkpoint that they are of stays as it is.

        Args:
            model: The model that the plan was made for, or one with the same linears.
            optimizers: They keep their state: no weight changes its size, and masks are held by others.
            weights: New values of parameters from which pruning starts.

        Raises:
            ValueError: If the plan was not made for this model.
        """
        linears, store, inside = self._linears(model), store_of(model), dict[nn.Module | None, list[str]]()
        for name in self.pruned:
            inside.setdefault(store.owner.get(linears[name]), []).append(name)

        def put_into(block: nn.Module | None) -> None:
            put([self.pruned[name].part(in_place(linears[name])) for name in inside.get(block, ())])

        sizes = {name: tuple(own.shape) for name, own in store.model.named_parameters(remove_duplicate=False)}

        def told() -> str:
            return f"{fingerprint(self.decided())} {LazyTensors.of(weights or {}).key}"

        with starting_from(model, weights) if weights else nullcontext(), store.step(f"{self.kind} {list(self.pruned)}", told):
            for block in store.blocks.values():
                if (block in inside or store.is_altered(block)) and not store.resumed(block, sizes):
                    with store.changing(block):
                        put_into(block)
            store.release()
            put_into(None)

    def decided(self) -> dict[str, str]:
        """Returns a hash of each linear's mask and values, on which ranks have to agree; they ask for it together."""
        return {name: one.decided for name, one in self.pruned.items()}

    def _linears(self, model: nn.Module) -> dict[str, nn.Module]:
        reshard(model)
        linears = prunable(model, output_embeddings=True, convolutions="all")
        found = {name: size_of(linear) for name, linear in linears.items()}
        if wrong := next((name for name in self.pruned if found.get(name) != self.shapes[name]), None):
            raise ValueError(
                f"plan: it was made for another model: {wrong} is {self.shapes[wrong]} there, and {found.get(wrong)} here"
            )
        return linears

    def text(self) -> str:
        """Returns all lines of what `print` shows."""
        rows = self._rows()
        width = max([len(name) for name, *_ in rows], default=0)
        lines = [f"{self.criterion}, {self.pattern}"]
        for name, number, (out, into), spread in rows:
            lines.append(f"  {name:<{width}}  {number:>4} x [{out:>6,}, {into:>6,}]  sparsity {spread}")
        lines += [f"  {name:<{width}}  not called by any batch: left as it is" for name in self.uncalled]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "linear", "linears", "weight [out, in]", "sparsity"
        rows = [(name, str(number), f"{out:,} x {into:,}", spread) for name, number, (out, into), spread in self._rows()]
        notes = [f"{name}: not called by any batch: left as it is" for name in self.uncalled]
        return html_table(f"{self.criterion}, {self.pattern}", head, rows, notes)

    def _rows(self) -> list[tuple[str, int, tuple[int, ...], str]]:
        """Returns for linears that are alike their name, number, shape, and the least and greatest sparsity."""
        alike: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
        for name, one in self.pruned.items():
            alike[re.sub(r"\b\d+\b", "*", name), self.shapes[name]].append(one.sparsity(math.prod(self.shapes[name])))
        rows = []
        for (name, shape), each in alike.items():
            low, high = min(each), max(each)
            rows.append((name, len(each), shape, f"{low:.4f}" if high - low < 5e-5 else f"{low:.4f} to {high:.4f}"))
        return rows
