"""Plan of weight pruning: packed masks and new values of each layer.

Masks are packed 8 weights to a byte in memory and in transfers. Devices pack and unpack their own, so that only bits are copied.
"""

import hashlib
import math
import re
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from typing_extensions import Self

from billhook.display import text_table
from billhook.engine import LazyTensors, Read, fingerprint, fresh_autocast_cache, local, reshard, sharded_as, store_of
from billhook.model import (
    ModelPlan,
    Weights,
    expert_layers,
    holder_of,
    prunable,
    size_of,
    stored_name,
    view_in,
    weight_view,
    with_weights,
)
from billhook.sparsity.masks import CPU_BLOCK, DEVICE_BLOCK, FEWEST, HOST, where_kept

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """The mask and new values of a linear layer, stored where a block store has staged them.

    If ranks share the model, all ranks read them together.

    Attributes:
        kept: Number of kept weights.
        read_bits: Reads the mask, 8 weights to a byte, uint8.
        read_values: Reads the kept weights if a criterion updates them; None otherwise.
    """

    kept: int
    read_bits: Read
    read_values: Read | None = None

    @classmethod
    def of(cls, old: Tensor, new: Tensor, keep: Tensor) -> Self:
        """Packs the change from an old to a new weight `[out_features, in_features]` with a mask."""
        changed = not torch.equal(new, where_kept(old, keep))
        return cls.of_bits(pack_mask(keep), new[keep].cpu() if changed else None)

    @classmethod
    def of_bits(cls, bits: np.ndarray, values: Tensor | None = None) -> Self:
        """Makes a layer from a packed mask, and from the kept weights `[kept]` if they change."""
        return cls(count_kept(bits), torch.from_numpy(bits).detach, None if values is None else values.detach)

    @property
    def bits(self) -> np.ndarray:
        """The mask, 8 weights to a byte."""
        return self.read_bits().cpu().numpy()

    @property
    def values(self) -> Tensor | None:
        """The kept weights on the CPU if a criterion updates them; None otherwise."""
        return None if self.read_values is None else self.read_values().cpu()

    @property
    def decided(self) -> str:
        """A hash of mask and values, for comparison between ranks."""
        digest, values = hashlib.sha256(self.bits.data), self.values
        if values is not None:
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def keep(self, like: Tensor) -> Tensor:
        """Unpacks the mask, bool, in the shape and on the device of a weight."""
        return unpack_mask(self.bits, like.numel(), like.device).view(like.shape)

    def weight(self, old: Tensor) -> Tensor:
        """Returns the pruned weight, `[out_features, in_features]`, or this rank's shard."""
        keep, values = self.keep(old), self.values
        if values is None:
            return where_kept(local(old), local(sharded_as(keep, old)))
        new = torch.zeros(old.shape, dtype=old.dtype, device=old.device).masked_scatter_(keep, values.to(old))
        return local(sharded_as(new, old))

    @fresh_autocast_cache()
    @torch.no_grad()
    def put_into(self, weight: Tensor) -> None:
        """Applies mask and new values to a weight `[out_features, in_features]`, in place.

        Works on groups of rows whose bits fill whole bytes, which limits extra memory. After an interrupt earlier rows are new
        and later rows old; another call completes all.
        """
        if isinstance(weight, DTensor):
            local(weight).copy_(self.weight(weight))
            return
        bits, values, used, width = self.bits, self.values, 0, math.prod(weight.shape[1:])
        step = max(1, (CPU_BLOCK if weight.device.type == HOST else DEVICE_BLOCK) // (8 * max(1, width))) * 8
        for start in range(0, len(weight), step):
            rows, first = weight[start : start + step], start * width // 8
            keep = unpack_mask(bits[first:], rows.numel(), rows.device).view(rows.shape)
            if values is None:
                rows.copy_(where_kept(rows, keep))
                continue
            kept = count_kept(bits[first : first - (-rows.numel() // 8)])
            rows.copy_(torch.zeros_like(rows).masked_scatter_(keep, values[used : used + kept].to(rows)))
            used += kept

    def to_json(self) -> dict[str, str]:
        """Returns bits and values as base64 text."""
        plain, values = {"bits": b64encode(self.bits.tobytes()).decode()}, self.values
        if values is None:
            return plain
        text = b64encode(values.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        return plain | {"dtype": str(values.dtype).removeprefix("torch."), "values": text}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], size: int) -> Self:
        """Makes a layer of `size` weights from the output of `to_json`.

        Raises:
            ValueError: If the lengths do not fit.
        """
        bits = np.frombuffer(bytearray(b64decode(plain["bits"], validate=True)), dtype=np.uint8)
        if len(bits) != -(-size // 8):
            raise ValueError(f"{len(bits)} bytes of bits for {size} weights")
        if "values" not in plain:
            return cls.of_bits(bits)
        values = torch.frombuffer(bytearray(b64decode(plain["values"], validate=True)), dtype=DTYPES[plain["dtype"]])
        if len(values) != count_kept(bits):
            raise ValueError(f"{len(values)} values for {count_kept(bits)} kept weights")
        return cls.of_bits(bits, values)


def pack_mask(mask: Tensor) -> np.ndarray:
    """Packs a mask, bool, in the order of `numpy.packbits`, padded with zeros.

    >>> pack_mask(torch.tensor([[True, False, True], [False, False, False]]))
    array([160], dtype=uint8)
    """
    if mask.device.type == HOST:
        return np.packbits(mask.numpy())
    flat = mask.reshape(-1).view(torch.uint8)
    columns = pad(flat, (0, -len(flat) % 8)).view(-1, 8).unbind(1)
    bits = torch.zeros_like(columns[0])
    for number, column in enumerate(columns):
        bits |= column << (7 - number)
    return bits.cpu().numpy()


def unpack_mask(bits: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Unpacks `size` weights on a device, bool, `[size]`; `bits` may be longer.

    >>> unpack_mask(np.array([160], dtype=np.uint8), 6, torch.device("cpu")).int()
    tensor([1, 0, 1, 0, 0, 0], dtype=torch.int32)
    """
    if device.type == HOST:
        return torch.from_numpy(np.unpackbits(bits, count=size).view(np.bool_))
    bytes_ = torch.from_numpy(bits[: -(-size // 8)]).to(device)
    columns = torch.stack([bytes_ >> shift for shift in range(7, -1, -1)], 1)
    return columns.bitwise_and_(1).view(-1)[:size].view(torch.bool)


def count_kept(bits: np.ndarray) -> int:
    """Counts the kept weights."""
    return int(np.bitwise_count(bits).sum())


@dataclass(frozen=True, eq=False, repr=False)
class WeightPlan(ModelPlan):
    """Plan of the weights to zero, and of new values if a criterion updates the others.

    Attributes:
        kind: `"weights"`.
        model: Class name of the model, for display; it differs for a sharded model.
        criterion: Criterion, as text.
        pattern: `"unstructured"` or `"N:M"`.
        pruned: Mask and values by layer: in memory, for a sharded model in shards, for a streamed model in files until it is
            saved.
        shapes: Shape of each layer's weight, `[out_features, in_features]`.
        uncalled: Layers that stay dense because no batch called them.
        unsupported: Shape of each weight that stays dense because it holds several matrices, as in custom experts.
        by_magnitude: Tokens of each matrix of an expert that was pruned by magnitude because it received too few.
    """

    kind = "weights"
    model: str
    criterion: str
    pattern: str
    pruned: Mapping[str, PrunedLayer]
    shapes: Mapping[str, tuple[int, ...]]
    uncalled: tuple[str, ...] = ()
    unsupported: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    by_magnitude: Mapping[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are removed, over all layers, with those that stay dense."""
        total = sum(map(math.prod, [*self.shapes.values(), *self.unsupported.values()]))
        removed = sum(math.prod(self.shapes[name]) - part.kept for name, part in self.pruned.items())
        return removed / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data: a bit per weight, and changed values in base64.

        For a sharded model, all ranks must call this together.
        """
        pruned = {name: {"shape": list(self.shapes[name]), **part.to_json()} for name, part in self.pruned.items()}
        uncalled = {name: list(self.shapes[name]) for name in self.uncalled}
        return {
            "kind": self.kind,
            "model": self.model,
            "criterion": self.criterion,
            "pattern": self.pattern,
            "pruned": pruned,
            "uncalled": uncalled,
            "unsupported": dict(self.unsupported),
            "by_magnitude": dict(self.by_magnitude),
        }

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            kind, criterion, pattern = (str(plain[name]) for name in ("model", "criterion", "pattern"))
            shapes, pruned = {}, {}
            for name, part in plain["pruned"].items():
                shapes[name] = tuple(map(int, part["shape"]))
                pruned[name] = PrunedLayer.from_json(part, math.prod(shapes[name]))
            uncalled = {name: tuple(map(int, shape)) for name, shape in plain["uncalled"].items()}
            unsupported = {name: tuple(map(int, shape)) for name, shape in plain["unsupported"].items()}
            by_magnitude = {name: int(tokens) for name, tokens in plain["by_magnitude"].items()}
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan was not written by WeightPlan.to_json ({type(error).__name__}: {error})") from error
        plan = cls(kind, criterion, pattern, pruned, shapes | uncalled, tuple(uncalled), unsupported, by_magnitude)
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Raises if a model lacks a layer of the plan, or has it in another size."""
        with expert_layers(model):
            self._linears(model)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the masks, bool, in the memory layout and sharding of their weights.

        The experts of a module have one mask for each parameter that stacks their matrices, such as `mlp.experts.down_proj`.
        """
        with expert_layers(model):
            linears, masks = self._linears(model), {}
            stored = defaultdict(list)
            for name, part in self.pruned.items():
                stored[stored_name(name, linears[name])].append((linears[name], part))
            for name, layers in stored.items():
                weight = getattr(*holder_of(layers[0][0]))
                mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
                for linear, part in layers:
                    keep = view_in(linear, mask)
                    keep.copy_(part.keep(keep))
                masks[name] = sharded_as(mask, weight)
        return masks

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Changes the weights in place, after checking plan and model.

        After an interrupt, weights of a model in memory may have changed in part; the same call again changes the others. For a
        streamed model, blocks are written one at a time, and the checkpoint does not change.

        Args:
            model: The model that the plan was made for, or one with the same linear layers.
            optimizers: Unused: no weight changes its size, so optimizer state stays.
            weights: New parameter values to start from.

        Raises:
            ValueError: If the plan was not made for this model.
        """
        store, layers_of_block = store_of(model), defaultdict(list)
        with expert_layers(model):
            linears = self._linears(model)
            for name in reversed(list(self.pruned)):  # last layers first: after an interrupt the rest still has its old inputs
                layers_of_block[store.owner.get(linears[name])].append(name)
        sizes = {name: tuple(parameter.shape) for name, parameter in store.model.named_parameters(remove_duplicate=False)}

        def put_into(block: nn.Module | None) -> None:
            for name in layers_of_block[block]:
                self.pruned[name].put_into(weight_view(linears[name]))

        def key() -> str:
            return f"{fingerprint(self.decided())} {LazyTensors.of(weights or {}).key}"

        with with_weights(model, weights) if weights else nullcontext(), store.step(f"{self.kind} {list(self.pruned)}", key):
            for block in store.blocks.values():
                if (block in layers_of_block or store.is_altered(block)) and not store.resume_block(block, sizes):
                    with store.changing(block):
                        put_into(block)
            store.release()
            put_into(None)

    def decided(self) -> dict[str, str]:
        """Returns a hash of each layer by name; all ranks of a sharded model call it together."""
        return {name: part.decided for name, part in self.pruned.items()}

    def _linears(self, model: nn.Module) -> dict[str, nn.Module]:
        reshard(model)
        linears = prunable(model, output_embeddings=True, convolutions="all")
        for name in self.pruned:
            size = size_of(linears[name]) if name in linears else None
            if size != self.shapes[name]:
                raise ValueError(
                    f"plan belongs to another model: {name} has shape {self.shapes[name]} in the plan and {size} here."
                )
        return linears

    def _renderables(self) -> list[RenderableType]:
        """Shows similar layers in a row: count, shape, and range of sparsity."""
        sparsities = defaultdict(list)
        for name, part in self.pruned.items():
            size = math.prod(self.shapes[name])
            sparsities[re.sub(r"\b\d+\b", "*", name), self.shapes[name]].append(1 - part.kept / size if size else 0.0)
        rows = []
        for (name, (out_features, in_features)), values in sparsities.items():
            low, high = min(values), max(values)
            spread = f"{low:.4f}" if high - low < 5e-5 else f"{low:.4f} to {high:.4f}"
            rows.append((name, f"{len(values):>4} x [{out_features:>6,}, {in_features:>6,}]  sparsity {spread}"))
        rows += [(name, "not called by any batch, kept dense") for name in self.uncalled]
        if self.by_magnitude:
            rows.append((f"{len(self.by_magnitude)} matrices of experts", f"fewer than {FEWEST} tokens, pruned by magnitude"))
        kinds = Counter((re.sub(r"\b\d+\b", "*", name), shape) for name, shape in self.unsupported.items())
        rows += [(name, f"{count:>4} x {list(shape)}  not linear layers, kept dense") for (name, shape), count in kinds.items()]
        return [f"{self.criterion}, {self.pattern}", text_table(rows, aligns="<", indent=2)]
