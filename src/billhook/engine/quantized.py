"""Quantized checkpoints: FP8 with a scale for each block of a matrix, and MXFP4."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SUFFIXES = {"": ("",), "fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
"""How names of values and scales end, by quantization method; tensors that are not quantized have no scales."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of four bits in MXFP4 without the highest bit, which is the sign."""
BIAS = 127  # of the exponents that are the scales of MXFP4


class Quantization:
    """How the tensors of a checkpoint are quantized.

    Args:
        name: The checkpoint, for errors.
        fields: The field `quantization_config` of its config. None if it is not quantized.

    Attributes:
        method: The quantization method, empty if there is none.

    Raises:
        ValueError: If it is neither MXFP4 nor FP8 with a scale for each block and dynamic activations.
    """

    def __init__(self, name: str, fields: Mapping[str, Any] | None = None) -> None:
        self.name, fields = name, {"quant_method": ""} if fields is None else fields
        self.method = str(fields.get("quant_method"))
        self._block: Any = fields.get("weight_block_size") if self.method == "fp8" else (1, 1)
        if self.method not in SUFFIXES or not self._block or fields.get("activation_scheme", "dynamic") != "dynamic":
            raise ValueError(
                f"'{name}': a checkpoint with quant_method={self.method!r} cannot be streamed. Legal are 'mxfp4', and 'fp8' with "
                "weight_block_size=[rows, columns] and activation_scheme='dynamic'. Dequantize the checkpoint first."
            )

    def stored(self, names: Collection[str]) -> dict[str, list[str]]:
        """Returns the names in the files of each tensor: those of values and scales, or its own."""
        suffixes, stored = SUFFIXES[self.method], defaultdict(list)
        for name in sorted(names):  # values before scales
            stems = [name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)]
            stored[next((stem for stem in stems if all(stem + suffix in names for suffix in suffixes)), name)].append(name)
        return stored

    def dequantized(self, slices: Mapping[str, Any]) -> dict[str, Any]:
        """Returns slices of dequantized tensors, given those in the files."""
        parts = {name: [slices[part] for part in parts] for name, parts in self.stored(slices).items()}
        return {name: part[0] if len(part) == 1 else _Slice(self, name, *part) for name, part in parts.items()}

    def dequantize(self, name: str, values: Tensor, scales: Tensor) -> Tensor:
        """Returns a tensor in bfloat16, as the model has it, from its values and scales.

        >>> fp8 = Quantization("", {"quant_method": "fp8", "weight_block_size": [2, 2]})
        >>> fp8.dequantize("", torch.ones(3, 2), torch.tensor([[2.0], [4.0]]))[:, 0]
        tensor([2., 2., 4.], dtype=torch.bfloat16)
        >>> mxfp4 = Quantization("", {"quant_method": "mxfp4"})
        >>> mxfp4.dequantize("", torch.tensor([[[0x21]]]), torch.tensor([[128]])).T  # 0.5 and 1.0, times 2
        tensor([[1., 2.]], dtype=torch.bfloat16)
        """
        is_fp8 = self.method == "fp8"
        if values.dim() > (2 if is_fp8 else 3):  # one expert at a time, because it becomes float32
            return torch.stack([self.dequantize(name, *expert) for expert in zip(values, scales, strict=True)])
        grid = [-(-size // block) for size, block in zip(values.shape, self._block, strict=False)]
        if list(scales.shape) != grid or scales.is_floating_point() != values.is_floating_point():
            raise ValueError(
                f"'{self.name}': {name} has values {list(values.shape)} of {values.dtype} and scales {list(scales.shape)} of "
                f"{scales.dtype}, which do not fit quant_method={self.method!r}. Dequantize the checkpoint first."
            )
        if is_fp8:
            for dim, block in enumerate(self._block):
                scales = scales.float().repeat_interleave(block, dim)
            return (values.float() * scales[: values.shape[0], : values.shape[1]]).bfloat16()
        numbers = torch.tensor(E2M1, device=values.device)
        numbers = torch.cat((numbers, -numbers))[torch.stack((values & 15, values >> 4), -1).int()]  # the low bits first
        return torch.ldexp(numbers, scales.int()[..., None, None] - BIAS).flatten(1).T.bfloat16()


@dataclass(frozen=True)
class _Slice:
    """A tensor that is read and dequantized by `[...]`."""

    quantization: Quantization
    name: str
    values: Any
    scales: Any

    def __getitem__(self, _: object) -> Tensor:
        return self.quantization.dequantize(self.name, self.values[...], self.scales[...])
