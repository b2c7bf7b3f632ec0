"""Input statistics of linear layers, summed in float32 over tokens.

An all-reduce of `tensors()` sums them over ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from billhook.arguments import check_int, check_types

TOKENS = 1024  # number of tokens in a product
ROWS = 1024  # number of rows of a Gram matrix in a product


def add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left^T right, of `[tokens, m]` and `[tokens, n]`, to sums `[m, n]`.

    Sums may be in a file: only some rows are in memory at a time.
    """
    buffer = torch.empty(min(ROWS, len(sums)), sums.shape[1], dtype=left.dtype, device=left.device)
    for first in range(0, len(sums), ROWS):
        rows = sums[first : first + ROWS]
        product = buffer[: len(rows)]
        for some, others in zip(torch.split(left, TOKENS), torch.split(right, TOKENS), strict=True):
            torch.mm(some[:, first : first + ROWS].t(), others, out=product)  # with out=, autocast keeps float32
            rows += product.to(rows.device)  # one product first: some kernels round after each token


class Statistics(ABC):
    """Sums over input tokens of a linear layer, and the number of tokens (`tokens`, int64)."""

    chunk: ClassVar[tuple[int, int]]
    """Number of input values in float32 at a time, on the CPU and on other devices."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        check_types(Statistics, {"in_features": in_features, "device": device})
        check_int("in_features", in_features, least=1)
        self.in_features = in_features
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._largest: Tensor | None = None  # of the first inputs: distinguishes zeros from squares that underflow

    @torch.no_grad()
    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Adds the inputs of a call: `[..., in_features]`, of any floating dtype.

        `keep`, bool, `[...]`, marks the tokens that count (None: all). Values of other tokens are ignored, even NaN.

        Raises:
            ValueError: If the shape of inputs or mask does not fit.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs of shape {list(inputs.shape)} must end with {self.in_features} input features")
        if keep is not None and (keep.dtype != torch.bool or keep.shape != inputs.shape[:-1]):
            raise ValueError(
                f"keep must be bool of shape {list(inputs.shape[:-1])} for inputs of shape {list(inputs.shape)}, "
                f"got {keep.dtype} of shape {list(keep.shape)}"
            )
        if inputs.numel():
            if self._largest is None:
                self._largest = (inputs if keep is None else inputs.masked_fill(~keep.unsqueeze(-1), 0)).abs().max()
            self._add(self._chunks(inputs.reshape(-1, self.in_features), None if keep is None else keep.reshape(-1, 1)))
        self.tokens += inputs.shape[:-1].numel() if keep is None else keep.sum()

    @property
    @abstractmethod
    def squares(self) -> Tensor:
        """||X_j||^2, the squared L2 norm of each input feature, float32, `[in_features]`."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, not copies, for an in-place sum over ranks."""

    def check(self) -> None:
        """Raises if there are no tokens, or if sums are NaN, infinite, or underflow."""
        finite = torch.isfinite(self.squares)
        fine = finite.all() & (self.tokens > 0)
        if self._largest is not None:
            fine &= self.squares.any() | (self._largest == 0).to(fine.device)
        if fine:  # a single synchronization
            return
        if not self.tokens:
            raise ValueError("no inputs were seen: the layer did not run, or every token was padding")
        if finite.all() and self._largest is not None:
            raise ValueError(
                f"inputs are {float(self._largest):.1g} at most, so that their squares underflow in float32: scale them up"
            )
        bad = (~finite).nonzero()
        raise ValueError(
            f"NaN, infinite or overflowing inputs in {len(bad)} of {self.in_features} input features, "
            f"the first in feature {int(bad[0])}"
        )

    @abstractmethod
    def _add(self, chunks: Iterator[Tensor]) -> None:
        """Adds chunks of float32 inputs, `[tokens, in_features]`, with zeros for padding."""

    def _chunks(self, inputs: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        step = max(1, self.chunk[inputs.device.type != "cpu"] // self.in_features)
        for start in range(0, len(inputs), step):
            chunk = inputs[start : start + step].float()
            yield chunk if keep is None else chunk.masked_fill(~keep[start : start + step], 0)


class InputNorms(Statistics):
    """The squared L2 norm of each input feature over all tokens, sum of x_j^2.

    >>> norms = InputNorms(2)
    >>> norms.add(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
    >>> norms.squares, norms.tokens
    (tensor([10.,  4.]), tensor(2))
    """

    chunk = (2**20, 2**24)

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self._squares = torch.zeros(in_features, device=device)

    @property
    def squares(self) -> Tensor:
        """||X_j||^2, float32, `[in_features]`."""
        return self._squares

    def tensors(self) -> list[Tensor]:
        """Returns the sums of squares, `[in_features]`, and the number of tokens, `[]`."""
        return [self._squares, self.tokens]

    def _add(self, chunks: Iterator[Tensor]) -> None:
        # sum each call first: many small additions to a large sum would round more
        self._squares += torch.stack([chunk.square().sum(0) for chunk in chunks]).sum(0)


class InputGram(Statistics):
    """The Gram matrix of the inputs, X^T X = sum over tokens of x x^T.

    >>> gram = InputGram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.products
    tensor([[10.,  2.],
            [ 2.,  4.]])
    """

    chunk = (2**23, 2**26)

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.products = torch.zeros(in_features, in_features, device=device)

    @property
    def squares(self) -> Tensor:
        """||X_j||^2, float32, `[in_features]`: the diagonal of the products."""
        return self.products.diagonal()

    def tensors(self) -> list[Tensor]:
        """Returns the products, `[in_features, in_features]`, and the number of tokens, `[]`."""
        return [self.products, self.tokens]

    def _add(self, chunks: Iterator[Tensor]) -> None:
        for chunk in chunks:
            add_products(self.products, chunk, chunk)
