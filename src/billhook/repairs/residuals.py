"""Statistics of layer inputs and residuals for least squares, and minimum token counts."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from billhook.engine import SINGLE_PROCESS, TOKENS, Comm, ModulesByName, Run, add_products
from billhook.engine.passes import ActivationFiles, zeros
from billhook.linalg import float64_device, widest_float

MAX_OUTPUTS = 1024
"""Most outputs, or mixtures of more, on which ridge penalties are tried."""
ALL_ROWS = slice(None)


class ResidualStatistics:
    """First and second moments of a layer's inputs x and residuals r, float64.

    The residual is the missing part of the layer's output.

    Args:
        out_features: Number of outputs.
        in_features: Number of kept inputs.
        device: Device of sums that are not in files; the CPU if it has no float64.
        files: Stores large sums on disk.

    Attributes:
        tokens: Sum of token weights, `[]`.
        sums: Sum of x, `[in_features]`.
        products: Sum of x x^T, `[in_features, in_features]`.
        residual_sums: Sum of r, `[out_features]`.
        residual_products: Sum of r x^T, `[out_features, in_features]`.
        residual_squares: Sum of r^2, `[out_features]`.
    """

    def __init__(
        self, out_features: int, in_features: int, device: torch.device | str = "cpu", files: ActivationFiles | None = None
    ) -> None:
        device = float64_device(device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.sums, self.residual_sums = self.tokens.new_zeros(in_features), self.tokens.new_zeros(out_features)
        self.products = zeros((in_features, in_features), torch.float64, device, files)
        self.residual_products = zeros((out_features, in_features), torch.float64, device, files)
        self.residual_squares = self.residual_sums.clone()

    def add(
        self, inputs: Tensor, residual: Tensor | None = None, keep: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Adds a call of a layer, multiplied in float32, or in float64 for float64 inputs.

        Args:
            inputs: Inputs, `[..., in_features]`, of any floating-point dtype.
            residual: Residuals, `[..., out_features]`. Defaults to None (zero).
            keep: Mask of non-padding tokens, bool, `[...]`. Defaults to all.
            weights: Token weights, `[...]`. Defaults to 1.
        """
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        weights = select_tokens(weights[..., None], keep).to(torch.promote_types(inputs.dtype, torch.float32))
        dtype, device = widest_float(inputs.device), self.tokens.device
        parts = torch.split(select_tokens(inputs, keep), TOKENS)
        residuals = [None] * len(parts) if residual is None else torch.split(select_tokens(residual, keep), TOKENS)
        for x, share, r in zip(parts, torch.split(weights, TOKENS), residuals, strict=True):
            weighted = as_float(x) * share
            self.tokens += share.sum(dtype=dtype).to(device)
            self.sums += weighted.sum(0, dtype=dtype).to(device)
            add_products(self.products, weighted, as_float(x))
            if r is not None:
                weighted = as_float(r) * share
                self.residual_sums += weighted.sum(0, dtype=dtype).to(device)
                add_products(self.residual_products, weighted, as_float(x))
                self.residual_squares += (weighted * as_float(r)).sum(0, dtype=dtype).to(device)

    def mixed(self, most: int = MAX_OUTPUTS) -> Self:
        """Returns statistics of random mixtures of residuals, for more than `most` outputs.

        The expected error on mixtures equals the error, and all ridge penalties use the same mixtures.
        """
        rows = len(self.residual_products)
        if rows <= most:
            return self
        mixing = torch.randn(most, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / most**0.5
        mixing = mixing.to(self.tokens.device)
        products = mixing.new_zeros(most, self.residual_products.shape[1])
        for columns, part in zip(torch.split(mixing, most, 1), torch.split(self.residual_products, most), strict=True):
            products.addmm_(columns, part)
        mixed = copy(self)
        mixed.residual_sums, mixed.residual_products = mixing @ self.residual_sums, products
        return mixed

    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, to be summed over ranks in place."""
        return [self.tokens, self.sums, self.products, self.residual_sums, self.residual_products, self.residual_squares]

    def after_removal(self, weight: Tensor, keep: Tensor) -> Self:
        """Returns the statistics of kept inputs, with the outputs of removed inputs as residuals.

        W is `[out_features, in_features]`, and `keep`, `[in_features]`, marks the kept inputs S. With removed inputs R, r = W_R
        x_R and E r x_S^T = W_R H_RS.
        """
        removed, kept_products, removed_products = weight[:, ~keep].double(), self.products[keep], self.products[~keep]
        new = copy(self)
        new.sums, new.products = self.sums[keep], kept_products[:, keep]
        new.residual_sums, new.residual_products = removed @ self.sums[~keep], removed @ kept_products[:, ~keep].t()
        new.residual_squares = (removed @ removed_products[:, ~keep]).mul_(removed).sum(1)
        return new

    def error(self, update: Tensor | None, shift: Tensor | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """Computes E |r - M x - b|^2 over some outputs, `[]`.

        Args:
            update: Weight update M, `[outputs, in_features]`. Defaults to None (zero).
            shift: Bias update b, `[outputs]`. Defaults to None (zero).
            rows: Output rows. Defaults to all; mixtures have no separate outputs.
        """
        error = self.residual_squares[rows].sum()
        if update is not None:
            for part, residual in zip(
                torch.split(update, TOKENS), torch.split(self.residual_products[rows], TOKENS), strict=True
            ):
                error += (part @ self.products).sub_(residual, alpha=2).mul_(part).sum()
        error /= self.tokens
        if shift is not None:
            x, r = self.sums / self.tokens, self.residual_sums / self.tokens  # means
            error += shift @ (shift - 2 * (r[rows] if update is None else r[rows] - update @ x))
        return error


class TokenBuffer:
    """Collects tokens for large products: adding 128 at a time takes twice as long as 1,024."""

    def __init__(self, statistics: ResidualStatistics) -> None:
        self._statistics, self._tokens = statistics, 0
        self._inputs, self._residuals, self._weights = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, inputs: Tensor, residual: Tensor | None, tokens: Tensor | None, weights: Tensor | None) -> None:
        """Copies the tokens of a call, like `ResidualStatistics.add`.

        Args:
            inputs: Inputs, `[..., in_features]`.
            residual: Residuals, `[..., out_features]`. None for zero.
            tokens: Indices of non-padding tokens, `[tokens]`. None for all.
            weights: Token weights, `[...]`. None for 1.
        """

        def counting_tokens(tensor: Tensor) -> Tensor:
            every = select_tokens(tensor, None)
            return every.clone() if tokens is None else every[tokens]

        if bool(self._residuals) != (residual is not None):
            self.flush()
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        self._inputs.append(counting_tokens(inputs))
        self._weights.append(counting_tokens(weights[..., None]).squeeze(-1))
        self._residuals += [] if residual is None else [counting_tokens(residual)]
        self._tokens += len(self._inputs[-1])
        if self._tokens >= TOKENS:
            self.flush()

    def flush(self) -> ResidualStatistics:
        """Adds all collected tokens to the statistics, and returns these."""
        if self._tokens:
            residual = torch.cat(self._residuals) if self._residuals else None
            self._statistics.add(torch.cat(self._inputs), residual, weights=torch.cat(self._weights))
        self._inputs, self._residuals, self._weights, self._tokens = [], [], [], 0
        return self._statistics


def as_float(tensor: Tensor) -> Tensor:
    """Converts to float32; float64 is unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def select_tokens(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Returns the non-padding tokens, `[tokens, ...]`, detached."""
    return tensor.detach().reshape(-1, tensor.shape[-1]) if keep is None else tensor.detach()[keep]


class NoRepair(ValueError):
    """No layer can be refitted: no consumer layer, or too few batches or tokens."""


def check_tokens(layers: ModulesByName, needed: Mapping[str, int], runs: Sequence[Run], comm: Comm = SINGLE_PROCESS) -> None:
    """Runs batches until a layer has enough non-padding tokens; raises if none has.

    Args:
        layers: The linear layers.
        needed: Tokens that each layer needs, as many as it has kept inputs.
        runs: The batches.
        comm: The ranks, each with its own batches.

    Raises:
        NoRepair: If no layer gets enough.
    """
    names, required = list(layers), torch.tensor([needed[name] for name in layers])
    tokens = torch.zeros_like(required)

    def count(number: int, run: Run, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        keep = non_padding(run, names[number], inputs)
        tokens[number] += inputs.shape[:-1].numel() if keep is None else int(keep.sum())

    for run in runs:
        with ExitStack() as stack:
            for number, linear in enumerate(layers.values()):
                hook = partial(count, number, run)
                stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            run.visit()
        if (tokens >= required).any():
            break
    tokens = comm(tokens.to(comm.device)).to(required.device)
    if not (tokens >= required).any():
        raise NoRepair(too_few_tokens_message(names[0], int(required[0]), int(tokens[0])))


def too_few_tokens_message(name: str, required: int, tokens: int | None = None) -> str:
    """Returns the message for a layer with too few tokens."""
    got = "" if tokens is None else f", got {tokens}"
    return f"batches: repair of {name} needs at least {required} non-padding tokens{got}. Use more or longer examples."


def not_refitted_message(names: Sequence[str]) -> str:
    """Returns the warning for layers that were not refitted, or an empty string.

    >>> not_refitted_message(["0.down_proj"])
    '1 linear layer was not repaired, because it had too few tokens: 0.down_proj'
    """
    layers, pronoun = ("1 linear layer was", "it") if len(names) == 1 else (f"{len(names)} linear layers were", "they")
    return f"{layers} not repaired, because {pronoun} had too few tokens: {', '.join(names)}" if names else ""


def strip_argument(error: ValueError) -> str:
    """Returns an error message without the argument name `batches`.

    >>> strip_argument(ValueError("batches: two are needed")), strip_argument(ValueError("model: another"))
    ('two are needed', 'model: another')
    """
    return str(error).removeprefix("batches: ")


def non_padding(run: Run, name: str, inputs: Tensor) -> Tensor | None:
    """Returns the mask of non-padding tokens of a layer, `[batch, length]`; None for all."""
    keep = run.tokens.get(name)
    if keep is None or keep.numel() != inputs.shape[:-1].numel():
        return None
    return keep.reshape(inputs.shape[:-1]).to(inputs.device)
