"""What pruning comes to, planned but not yet done: one bit a weight, and the values that a criterion has changed."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.model.linears import prunable, weight_of
from billhook.running.shards import local, reshard, sharded_as
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.masks import where_kept


@dataclass(frozen=True)
class Pruned:
    """What becomes of one linear.

    Attributes:
        bits: The keep-mask, 8 weights a byte.
        values: What is kept, where a criterion updates weights, on the CPU; None where the old values stay.
    """

    bits: np.ndarray
    values: Tensor | None

    @staticmethod
    def of(old: Tensor, new: Tensor, keep: Tensor) -> "Pruned":
        """From a weight `[out_features, in_features]`, what it becomes, and its keep-mask."""
        changed = not torch.equal(new, where_kept(old, keep))
        return Pruned(np.packbits(keep.cpu().numpy()), new[keep].cpu() if changed else None)

    @property
    def kept(self) -> int:
        """How many weights stay."""
        return int(np.bitwise_count(self.bits).sum())

    def sparsity(self, size: int) -> float:
        """The fraction of a weight of so many entries that goes."""
        return 1 - self.kept / size if size else 0.0

    def keep(self, like: Tensor) -> Tensor:
        """The keep-mask, bool, of the size and on the device of a weight."""
        bits = np.unpackbits(self.bits, count=like.numel()).view(np.bool_)
        return torch.from_numpy(bits).view(like.shape).to(like.device)

    def weight(self, old: Tensor) -> Tensor:
        """What a weight becomes; of one that is sharded, this rank's part."""
        keep = self.keep(old)
        if self.values is None:
            return where_kept(local(old), local(sharded_as(keep, old)))
        new = torch.zeros(old.shape, dtype=old.dtype, device=old.device)
        return local(sharded_as(new.masked_scatter_(keep, self.values.to(old)), old))


@dataclass(frozen=True, eq=False)
class Pruning:
    """Which weights of a model become zero, and what a criterion makes of the others; `print` shows a table.

    Attributes:
        criterion: What chose them.
        pattern: `"unstructured"` or `"N:M"`.
        pruned: The results by linear.
        shapes: Of each linear's weight, `[out_features, in_features]`.
        uncalled: Linears that stay as they are, as no batch has called them.
    """

    criterion: Criterion
    pattern: str
    pruned: dict[str, Pruned]
    shapes: dict[str, tuple[int, ...]]
    uncalled: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of all linears that goes."""
        total = sum(math.prod(self.shapes[name]) for name in self.pruned)
        return 1 - sum(one.kept for one in self.pruned.values()) / total if total else 0.0

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """The keep-masks, bool, each as its weight lies in memory, and sharded as it is.

        Raises:
            ValueError: If the model is not the one, or one of the same linears, that this was planned for.
        """
        linears = self._linears(model)
        weights = {name: weight_of(linears[name]) for name in self.pruned}
        masks = {name: sharded_as(one.keep(weights[name]), weights[name]) for name, one in self.pruned.items()}
        return {name: mask.t() if isinstance(linears[name], Conv1D) else mask for name, mask in masks.items()}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Changes the weights, in place; if that fails, nothing has changed. What goes rests in the CPU's memory for that long.

        Raises:
            ValueError: If the model is not the one, or one of the same linears, that this was planned for.
        """
        linears = self._linears(model)
        gone: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            for name, one in self.pruned.items():
                new, weight = one.weight(weight_of(linears[name])), local(weight_of(linears[name]))
                changes = (new != weight).cpu()
                gone.append((weight, changes, weight.cpu()[changes]))
                weight.copy_(new)
        except BaseException:
            for weight, changes, values in gone:
                weight.masked_scatter_(changes.to(weight.device), values.to(weight.device))
            raise

    def _linears(self, model: nn.Module) -> dict[str, nn.Module]:
        reshard(model)
        linears = prunable(model, output_embeddings=True)
        found = {name: tuple(weight_of(linear).shape) for name, linear in linears.items()}
        if wrong := [name for name in self.pruned if found.get(name) != self.shapes[name]]:
            raise ValueError(
                f"this was planned for another model: {wrong[0]} is {self.shapes[wrong[0]]}, not {found.get(wrong[0])}"
            )
        return linears

    def __str__(self) -> str:
        alike: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
        for name, one in self.pruned.items():
            alike[re.sub(r"\b\d+\b", "*", name), self.shapes[name]].append(one.sparsity(math.prod(self.shapes[name])))
        rows = [(name, len(own), shape, own) for (name, shape), own in alike.items()]
        width = max([len(name) for name, *_ in rows], default=0)
        lines = [f"{self.criterion}, {self.pattern}"]
        for name, count, (out, into), own in rows:
            spread = f"{min(own):.4f}" if max(own) - min(own) < 5e-5 else f"{min(own):.4f} to {max(own):.4f}"
            lines.append(f"  {name:<{width}}  {count:>4} x [{out:>6,}, {into:>6,}]  sparsity {spread}")
        lines += [f"  {name:<{width}}  not called by any batch: left as it is" for name in self.uncalled]
        return "\n".join(lines)
