"""A pruned weight before it is put in place: a bit for each entry, and new values where a criterion changes them.

Masks have 8 weights a byte as they wait and travel: a device packs and unpacks its own, so that only bits are copied.
"""

import hashlib
import math
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from typing_extensions import Self

from billhook.engine.lazy import LazyTensors, Read
from billhook.engine.sharding import local, sharded_as
from billhook.engine.state import fresh_casts
from billhook.sparsity.masks import CPU_BLOCK, DEVICE_BLOCK, where_kept

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
HOST = "cpu"
"""The device on which NumPy packs, in a tenth of the time that torch takes there."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """One linear's part of a plan, which lies where a store has staged it; where ranks share it, all ranks read it together.

    Attributes:
        kept: How many weights are kept.
        read_bits: Reads the keep-mask, 8 weights a byte, uint8.
        read_values: Reads the kept weights, where a criterion updates them; None where the old values stay.
    """

    kept: int
    read_bits: Read
    read_values: Read | None = None

    @classmethod
    def of(cls, old: Tensor, new: Tensor, keep: Tensor) -> Self:
        """Packs the change of a weight `[out_features, in_features]` from old to new under a keep-mask."""
        changed = not torch.equal(new, where_kept(old, keep))
        return cls.of_bits(packed(keep), new[keep].cpu() if changed else None)

    @classmethod
    def of_bits(cls, bits: np.ndarray, values: Tensor | None = None) -> Self:
        """Takes a mask with 8 weights a byte, and the kept weights, if they change."""
        return cls(count(bits), torch.from_numpy(bits).detach, None if values is None else values.detach)

    @classmethod
    def staged(cls, kept: int, weight: str, tensors: LazyTensors) -> Self:
        """Takes what a store has staged for a weight, as `to_stage` names it."""
        return cls(kept, tensors.reads[f"bits {weight}"], tensors.reads.get(f"values {weight}"))

    def to_stage(self, weight: str) -> dict[str, Tensor]:
        """Returns what a store is to stage, by the name of the weight behind that of the part."""
        bits = {f"bits {weight}": self.read_bits()}
        return bits if self.read_values is None else bits | {f"values {weight}": self.read_values()}

    @property
    def bits(self) -> np.ndarray:
        """The keep-mask, 8 weights a byte."""
        bits: np.ndarray = _on_host(self.read_bits()).numpy()
        return bits

    @property
    def values(self) -> Tensor | None:
        """The kept weights, where a criterion updates them, on the CPU; None where the old values stay."""
        return None if self.read_values is None else _on_host(self.read_values())

    @property
    def decided(self) -> str:
        """A hash of the mask and the values, on which ranks have to agree."""
        digest, values = hashlib.sha256(self.bits.data), self.values
        if values is not None:
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def sparsity(self, size: int) -> float:
        """Returns the fraction removed of a weight of so many entries."""
        return 1 - self.kept / size if size else 0.0

    def keep(self, like: Tensor) -> Tensor:
        """Unpacks the keep-mask, bool, of the size and on the device of a weight."""
        return unpacked(self.bits, like.numel(), like.device).view(like.shape)

    def mask(self, like: Tensor) -> Tensor:
        """Returns the keep-mask, bool, as a weight lies; sharded if that is."""
        return sharded_as(self.keep(like), like)

    def weight(self, old: Tensor) -> Tensor:
        """Returns the weight after pruning; of one that is sharded, this rank's part."""
        keep, values = self.keep(old), self.values
        if values is not None:
            new = torch.zeros(old.shape, dtype=old.dtype, device=old.device).masked_scatter_(keep, values.to(old))
            return local(sharded_as(new, old)) if isinstance(old, DTensor) else new
        return where_kept(local(old), local(sharded_as(keep, old))) if isinstance(old, DTensor) else where_kept(old, keep)

    @fresh_casts()
    @torch.no_grad()
    def put_into(self, weight: Tensor) -> None:
        """Zeroes what the mask leaves out of a weight, in place, and gives what it keeps its new values, if there are any.

        It goes some rows at a time, whose bits fill whole bytes, so that little lies beside the model. Where it is stopped, the
        rows before have their values and the others theirs of before; called again, it puts all.
        """
        if isinstance(weight, DTensor):
            local(weight).copy_(self.weight(weight))
            return
        bits, values, taken, width = self.bits, self.values, 0, math.prod(weight.shape[1:])
        step = max(1, (CPU_BLOCK if weight.device.type == HOST else DEVICE_BLOCK) // (8 * max(1, width))) * 8
        for start in range(0, len(weight), step):
            rows, first = weight[start : start + step], start * width // 8
            keep = unpacked(bits[first:], rows.numel(), rows.device).view(rows.shape)
            if values is None:
                rows.copy_(where_kept(rows, keep))
                continue
            kept = count(bits[first : first - (-rows.numel() // 8)])
            rows.copy_(torch.zeros_like(rows).masked_scatter_(keep, values[taken : taken + kept].to(rows)))
            taken += kept

    def to_json(self) -> dict[str, str]:
        """Returns bits and values as text, in base 64."""
        plain, values = {"bits": b64encode(self.bits.tobytes()).decode()}, self.values
        if values is None:
            return plain
        text = b64encode(values.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        return plain | {"dtype": str(values.dtype).removeprefix("torch."), "values": text}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], size: int) -> Self:
        """Makes the part of a linear with so many weights from what `to_json` returned."""
        bits = np.frombuffer(bytearray(b64decode(plain["bits"], validate=True)), dtype=np.uint8)
        if len(bits) != -(-size // 8):
            raise ValueError(f"{len(bits)} bytes of bits for {size} weights")
        if "values" not in plain:
            return cls.of_bits(bits)
        values = torch.frombuffer(bytearray(b64decode(plain["values"], validate=True)), dtype=DTYPES[plain["dtype"]])
        if len(values) != count(bits):
            raise ValueError(f"{len(values)} values for {count(bits)} weights that are kept")
        return cls.of_bits(bits, values)


def _on_host(tensor: Tensor) -> Tensor:
    """Returns what has been read on the CPU, where it lies unless ranks share it."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def packed(mask: Tensor) -> np.ndarray:
    """Packs a mask, bool, of any shape; in the order of `numpy.packbits`, with zeros at the end of the last byte.

    >>> packed(torch.tensor([[True, False, True], [False, False, False]]))
    array([160], dtype=uint8)
    """
    if mask.device.type == HOST:
        return np.packbits(mask.numpy())
    flat = mask.reshape(-1).view(torch.uint8)
    columns = pad(flat, (0, -len(flat) % 8)).view(-1, 8).unbind(1)
    bits = torch.zeros_like(columns[0])
    for place, column in enumerate(columns):
        bits |= column << (7 - place)
    found: np.ndarray = bits.cpu().numpy()
    return found


def unpacked(bits: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Unpacks so many weights, bool, `[size]`, on a device; `bits` may go on.

    >>> unpacked(np.array([160], dtype=np.uint8), 6, torch.device("cpu")).int()
    tensor([1, 0, 1, 0, 0, 0], dtype=torch.int32)
    """
    if device.type == HOST:
        return torch.from_numpy(np.unpackbits(bits, count=size).view(np.bool_))
    own = torch.from_numpy(bits[: -(-size // 8)]).to(device)
    columns = torch.stack([own >> place for place in range(7, -1, -1)], 1)
    return columns.bitwise_and_(1).view(-1)[:size].view(torch.bool)


def count(bits: np.ndarray) -> int:
    """Counts the weights that are kept."""
    return int(np.bitwise_count(bits).sum())
