"""Moments of what a linear is given and of what it owes, of which least squares are solved, and the tokens that they need."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from billhook.engine.batches import Run
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.passes import ActivationFiles, zeros
from billhook.engine.statistics import TOKENS, add_products
from billhook.linalg import float64_device, widest_float

MAX_OUTPUTS = 1024
"""How many outputs, or mixtures of more, ridges are tried on."""
ALL_ROWS = slice(None)


class ResidualStatistics:
    """First and second moments of a linear's inputs, and of what it owes in addition to its own output, float64.

    Args:
        out_features: Of the linear.
        in_features: Of the linear, as far as they are kept.
        device: Where sums are, if not in files; the CPU, where it has no float64.
        files: What keeps those that are large there.

    Attributes:
        tokens: How many tokens were added, each with its weight, `[]`.
        sums: The sum of their inputs x, `[in_features]`.
        products: The sum of x x^T, `[in_features, in_features]`.
        owed_sums: The sum of what is owed, d, `[out_features]`.
        owed_products: The sum of d x^T, `[out_features, in_features]`.
        owed_squares: The sum of d^2, `[out_features]`.
    """

    def __init__(
        self, out_features: int, in_features: int, device: torch.device | str = "cpu", files: ActivationFiles | None = None
    ) -> None:
        device = float64_device(device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.sums, self.owed_sums = self.tokens.new_zeros(in_features), self.tokens.new_zeros(out_features)
        self.products = zeros((in_features, in_features), torch.float64, device, files)
        self.owed_products = zeros((out_features, in_features), torch.float64, device, files)
        self.owed_squares = self.owed_sums.clone()

    def add(self, inputs: Tensor, owed: Tensor | None = None, keep: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds what a linear is given in one call; multiplied in float32, or in float64 if the inputs are.

        Args:
            inputs: `[..., in_features]`, of any floating dtype.
            owed: Addition that its outputs need, `[..., out_features]`, if any.
            keep: Which tokens count, bool, `[...]`; all if None.
            weights: How much each token counts, `[...]`; all one if None.
        """
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        weights = tokens_of(weights[..., None], keep).to(torch.promote_types(inputs.dtype, torch.float32))
        dtype, device = widest_float(inputs.device), self.tokens.device
        chunks = list(zip(torch.split(tokens_of(inputs, keep), TOKENS), torch.split(weights, TOKENS), strict=True))
        for x, share in chunks:
            weighted = as_float(x) * share
            self.tokens += share.sum(dtype=dtype).to(device)
            self.sums += weighted.sum(0, dtype=dtype).to(device)
            add_products(self.products, weighted, as_float(x))
        if owed is not None:
            for (x, share), d in zip(chunks, torch.split(tokens_of(owed, keep), TOKENS), strict=True):
                weighted = as_float(d) * share
                self.owed_sums += weighted.sum(0, dtype=dtype).to(device)
                add_products(self.owed_products, weighted, as_float(x))
                self.owed_squares += (weighted * as_float(d)).sum(0, dtype=dtype).to(device)

    def mixed(self) -> Self:
        """Returns moments of random mixtures of what is owed, if that has more than `MAX_OUTPUTS` features; inputs are the same.

        The expectation of the error on mixtures is the error itself, and all ridges are tried on the same ones.
        """
        rows = len(self.owed_products)
        if rows <= MAX_OUTPUTS:
            return self
        mixing = (
            torch.randn(MAX_OUTPUTS, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / MAX_OUTPUTS**0.5
        )
        mixing = mixing.to(self.tokens.device)
        products = mixing.new_zeros(MAX_OUTPUTS, self.owed_products.shape[1])
        for columns, some in zip(torch.split(mixing, MAX_OUTPUTS, 1), torch.split(self.owed_products, MAX_OUTPUTS), strict=True):
            products.addmm_(columns, some)
        return self._with(self.sums, self.products, mixing @ self.owed_sums, products, self.owed_squares)

    def _with(self, sums: Tensor, products: Tensor, owed_sums: Tensor, owed_products: Tensor, owed_squares: Tensor) -> Self:
        """Returns moments of the same tokens."""
        new = copy(self)
        new.sums, new.products = sums, products
        new.owed_sums, new.owed_products, new.owed_squares = owed_sums, owed_products, owed_squares
        return new

    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, not copies, to be summed over ranks in place."""
        return [self.tokens, self.sums, self.products, self.owed_sums, self.owed_products, self.owed_squares]

    def without(self, weight: Tensor, keep: Tensor) -> Self:
        """Returns the moments of some inputs, where a linear that owed nothing owes what the others gave.

        With S the inputs that are kept and R those removed, that is d = W_R x_R: so E d x_S^T = W_R H_RS.
        """
        removed, stays, goes = weight[:, ~keep].double(), self.products[keep], self.products[~keep]
        squares = (removed @ goes[:, ~keep]).mul_(removed).sum(1)
        owed = removed @ self.sums[~keep], removed @ stays[:, ~keep].t(), squares
        return self._with(self.sums[keep], stays[:, keep], *owed)

    @property
    def centre(self) -> tuple[Tensor, Tensor]:
        """The means of x and d, `[in_features]` and `[out_features]`."""
        return self.sums / self.tokens, self.owed_sums / self.tokens

    def error(self, more: Tensor | None, shift: Tensor | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """Computes E |d - M x - b|^2 over some outputs, `[]`.

        Args:
            more: M, what is added to the weight, `[outputs, in_features]`; zero if None.
            shift: b, what is added to the bias, `[outputs]`; zero if None.
            rows: The outputs; all by default, as those of mixtures are not apart.
        """
        error = self.owed_squares[rows].sum()
        if more is not None:
            for some, owed in zip(torch.split(more, TOKENS), torch.split(self.owed_products[rows], TOKENS), strict=True):
                error += (some @ self.products).sub_(owed, alpha=2).mul_(some).sum()
        error /= self.tokens
        if shift is not None:
            x, d = self.centre
            error += shift @ (shift - 2 * (d[rows] if more is None else d[rows] - more @ x))
        return error


class TokenBuffer:
    """Holds tokens back that are added to moments, until there are as many as are multiplied at a time.

    However few they are, adding them goes over all sums: of 4,096 inputs, 128 tokens at a time take twice as long as 1,024.
    """

    def __init__(self, moments: ResidualStatistics) -> None:
        self._moments, self._tokens = moments, 0
        self._inputs, self._owed, self._weights = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, inputs: Tensor, owed: Tensor | None, tokens: Tensor | None, weights: Tensor | None) -> None:
        """Adds what a linear is given in one call, as `ResidualStatistics.add` does; copies stay, if any.

        Where only some tokens count, these are their numbers, of all that are in the call.
        """

        def counting_tokens(tensor: Tensor) -> Tensor:
            every = tokens_of(tensor, None)
            return every.clone() if tokens is None else every[tokens]

        if bool(self._owed) != (owed is not None):
            self.empty()
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        self._inputs.append(counting_tokens(inputs))
        self._weights.append(counting_tokens(weights[..., None]).squeeze(-1))
        self._owed += [] if owed is None else [counting_tokens(owed)]
        self._tokens += len(self._inputs[-1])
        if self._tokens >= TOKENS:
            self.empty()

    def empty(self) -> None:
        """Adds all that was held back."""
        if self._tokens:
            owed = torch.cat(self._owed) if self._owed else None
            self._moments.add(torch.cat(self._inputs), owed, weights=torch.cat(self._weights))
        self._inputs, self._owed, self._weights, self._tokens = [], [], [], 0


Fold = tuple[Sequence[ResidualStatistics], ResidualStatistics]
"""Data that a ridge is tried on: parts that are fitted to, and the one that is held out."""


def make_folds(parts: Sequence[ResidualStatistics], held_out: Sequence[int]) -> list[Fold]:
    """Returns the data that a ridge is tried on: each of some parts held out in turn, where it and the others have tokens."""
    tokens, folds = torch.stack([part.tokens for part in parts]).tolist(), list[Fold]()
    for number in held_out:
        others = [part for other, part in enumerate(parts) if other != number and tokens[other]]
        if others and tokens[number]:
            folds.append((others, parts[number]))
    return folds


def as_float(tensor: Tensor) -> Tensor:
    """Converts to float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tokens_of(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Returns the tokens that count, `[tokens, ...]`, without their gradients."""
    return tensor.detach().reshape(-1, tensor.shape[-1]) if keep is None else tensor.detach()[keep]


class NoRepair(ValueError):
    """Raised where no linear can be refitted: none reads what is removed, or batches, or their tokens, are too few."""


def check_tokens(
    linears: Mapping[str, nn.Module], needed: Mapping[str, int], runs: Sequence[Run], comm: Comm = SINGLE_PROCESS
) -> None:
    """Refuses batches that give no linear enough tokens that count; runs them until one has enough.

    Args:
        linears: The linears.
        needed: By linear, how many tokens it needs: as many as inputs that it keeps.
        runs: The batches.
        comm: The ranks, each of which has batches of its own.

    Raises:
        NoRepair: If none has enough.
    """
    names, wanted = list(linears), torch.tensor([needed[name] for name in linears])
    tokens = torch.zeros_like(wanted)

    def count(number: int, run: Run, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        keep = non_padding(run, names[number], inputs)
        tokens[number] += inputs.shape[:-1].numel() if keep is None else int(keep.sum())

    for run in runs:
        with ExitStack() as stack:
            for number, linear in enumerate(linears.values()):
                hook = partial(count, number, run)
                stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            run.visit()
        if (tokens >= wanted).any():
            break
    tokens = comm(tokens.to(comm.device)).to(wanted.device)
    if not (tokens >= wanted).any():
        raise NoRepair(f"{too_few_tokens(names[0])}, which is given {int(tokens[0])} and needs {int(wanted[0])} at least")


def too_few_tokens(first: str) -> str:
    """Returns the words for what is refused."""
    return f"batches: too few tokens that count for any refit; the first linear is {first}"


def not_refitted_message(names: Sequence[str]) -> str:
    """Returns the words for linears that were not refitted; empty if there are none.

    >>> not_refitted_message(["0.down_proj"])
    'too few tokens have come to 1 linear, which is not refitted: 0.down_proj'
    """
    which = "1 linear, which is" if len(names) == 1 else f"{len(names)} linears, which are"
    return f"too few tokens have come to {which} not refitted: {', '.join(names)}" if names else ""


def strip_argument(error: ValueError) -> str:
    """Returns what is wrong with batches without the name of the argument, which is another one elsewhere.

    >>> strip_argument(ValueError("batches: two are needed")), strip_argument(ValueError("model: another"))
    ('two are needed', 'model: another')
    """
    return str(error).removeprefix("batches: ")


def non_padding(run: Run, name: str, inputs: Tensor) -> Tensor | None:
    """Finds the tokens of a linear's inputs that count, bool, `[batch, length]`; None if all do."""
    keep = run.tokens.get(name)
    if keep is None or keep.numel() != inputs.shape[:-1].numel():
        return None
    return keep.reshape(inputs.shape[:-1]).to(inputs.device)
