"""Results for one linear: a bit for each weight, and the values that a criterion changes; as a whole, or this rank's share."""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import Self

from billhook.engine.sharding import Lies, local, sharded_as, whole
from billhook.sparsity.bits import count, packed, unpacked
from billhook.sparsity.masks import where_kept
from billhook.sparsity.put import Part

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Pruned:
    """One linear's part of a plan.

    Attributes:
        bits: The keep-mask, 8 weights a byte, on the CPU.
        values: The kept weights, where a criterion updates them, on the CPU; None where the old values stay.
    """

    bits: np.ndarray
    values: Tensor | None

    @staticmethod
    def of(old: Tensor, new: Tensor, keep: Tensor) -> "Pruned":
        """Packs the change of a weight `[out_features, in_features]` from old to new under a keep-mask."""
        changed = not torch.equal(new, where_kept(old, keep))
        return Pruned(packed(keep), new[keep].cpu() if changed else None)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return count(self.bits)

    @property
    def decided(self) -> object:
        """The mask and the values, on which ranks have to agree."""
        return [self.bits, self.values]

    def sparsity(self, size: int) -> float:
        """Returns the fraction removed of a weight of so many entries."""
        return 1 - self.kept / size if size else 0.0

    def keep(self, like: Tensor) -> Tensor:
        """Unpacks the keep-mask, bool, of the size and on the device of a weight."""
        return _unpacked(self.bits, like)

    def mask(self, like: Tensor) -> Tensor:
        """Returns the keep-mask, bool, as a weight lies; sharded if that is."""
        return sharded_as(self.keep(like), like)

    def part(self, old: Tensor) -> Part:
        """Returns what is put in the place of a weight; of one that is sharded, this rank's part."""
        return self.share(old).part(old) if isinstance(old, DTensor) else (old, self.bits, self.values)

    def weight(self, old: Tensor) -> Tensor:
        """Returns the weight after pruning; of one that is sharded, this rank's part."""
        keep = self.keep(old)
        if self.values is None:
            return where_kept(local(old), local(sharded_as(keep, old)))
        new = torch.zeros(old.shape, dtype=old.dtype, device=old.device)
        return local(sharded_as(new.masked_scatter_(keep, self.values.to(old)), old))

    def share(self, old: DTensor) -> "Share":
        """Returns this rank's part of it, of a weight that is sharded."""
        keep, digest = local(self.mask(old)), hashlib.sha256(self.bits.data)
        values = None
        if self.values is not None:
            values = self.weight(old)[keep].cpu()
            digest.update(self.values.contiguous().view(torch.uint8).numpy().data)
        bits = packed(keep)
        return Share(bits, values, self.kept, digest.hexdigest(), old.shape, keep.shape, Lies.of(old))

    def to_json(self) -> dict[str, str]:
        """Returns bits and values as text, in base 64."""
        plain = {"bits": b64encode(self.bits.tobytes()).decode()}
        if self.values is None:
            return plain
        values = b64encode(self.values.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        return plain | {"dtype": str(self.values.dtype).removeprefix("torch."), "values": values}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], size: int) -> Self:
        """Makes the part of a linear with so many weights from what `to_json` returned."""
        pruned = cls(np.frombuffer(bytearray(b64decode(plain["bits"], validate=True)), dtype=np.uint8), None)
        if len(pruned.bits) != -(-size // 8):
            raise ValueError(f"{len(pruned.bits)} bytes of bits for {size} weights")
        if "values" not in plain:
            return pruned
        values = torch.frombuffer(bytearray(b64decode(plain["values"], validate=True)), dtype=DTYPES[plain["dtype"]])
        if len(values) != pruned.kept:
            raise ValueError(f"{len(values)} values for {pruned.kept} weights that are kept")
        return cls(pruned.bits, values)


@dataclass(frozen=True)
class Share:
    """One linear's part of a plan where its weight is sharded: of that, what is this rank's.

    Attributes:
        bits: The keep-mask of this rank's weights, 8 weights a byte.
        values: Those of them that are kept, where a criterion updates them, on the CPU; None where the old values stay.
        kept: How many weights of the linear are kept, on all ranks.
        decided: A hash of the whole keep-mask and of all values, which ranks have to agree on.
        shape: Of the whole weight, as the mask is of it.
        own: The shape of this rank's part.
        lies: How the weight lies on ranks.
    """

    bits: np.ndarray
    values: Tensor | None
    kept: int
    decided: str
    shape: torch.Size
    own: torch.Size
    lies: Lies

    def sparsity(self, size: int) -> float:
        """Returns the fraction removed of a weight of so many entries."""
        return 1 - self.kept / size if size else 0.0

    def mask(self, like: Tensor) -> Tensor:
        """Returns the keep-mask, bool, sharded as the weight."""
        self._check(like)
        return self.lies.joined(_unpacked(self.bits, local(like)), self.shape)

    def part(self, old: Tensor) -> Part:
        """Returns what is put in the place of this rank's part of the weight."""
        self._check(old)
        return local(old), self.bits, self.values

    def whole(self) -> Pruned:
        """Returns it of the whole weight; all ranks call it together."""
        keep = _unpacked(self.bits, torch.empty(self.own, dtype=torch.bool))
        every = whole(self.lies.joined(keep, self.shape))
        bits = packed(every)
        if self.values is None:
            return Pruned(bits, None)
        new = torch.zeros(self.own, dtype=self.values.dtype).masked_scatter_(keep, self.values)
        return Pruned(bits, whole(self.lies.joined(new, self.shape))[every].cpu())

    def to_json(self) -> dict[str, str]:
        """Returns bits and values of the whole weight as text, in base 64; all ranks call it together."""
        return self.whole().to_json()

    def _check(self, weight: Tensor) -> None:
        """Refuses a weight of which this rank has another part."""
        there = isinstance(weight, DTensor) and (weight.device_mesh, weight.placements) == (self.lies.mesh, self.lies.placements)
        if not there or weight.shape != self.shape:
            raise ValueError(
                f"plan: it was made where weights lay on ranks in another way, {self.lies.placements} of {list(self.shape)}: "
                "plan anew, or carry out Plan.from_json(plan.to_json(), model), of which all ranks make the first together"
            )


@dataclass(frozen=True)
class Applied:
    """One linear's part of a plan that was carried out at once, as its model is streamed.

    Attributes:
        kept: How many weights are kept.
    """

    kept: int

    def sparsity(self, size: int) -> float:
        """Returns the fraction removed of a weight of so many entries."""
        return 1 - self.kept / size if size else 0.0


def _unpacked(bits: np.ndarray, like: Tensor) -> Tensor:
    """Unpacks bits, bool, to the size and the device of a tensor."""
    return unpacked(bits, like.numel(), like.device).view(like.shape)
