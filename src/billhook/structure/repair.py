"""Repair: when units are chosen to go, the linears that read them are refitted, so that they make up for what goes.

Linear after linear, in the order in which the model calls them, each on what it is given when all before it have lost their
inputs and been refitted. A ridge pulls towards the old weights; how strongly is chosen for each linear on batches that the refit
has not seen, and to leave the old weights as they are is always among the candidates.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.ambient import undisturbed
from billhook.structure.least_squares import Moments, refit_linear
from billhook.structure.probes import Trial
from billhook.walk import Reduce, Site, Walk, find_sites, replaced


@dataclass(frozen=True)
class Repair:
    """How the linears that read removed units are refitted; the defaults are what has done best without training.

    Args:
        held_out: Share of the calibration batches that choose the ridge, at least one; in (0, 1).
        ridges: Candidates for the ridge, each a share of every input's own mean square (or variance, where there is a bias).

    Raises:
        ValueError: If the share is not between 0 and 1, or there is no ridge or one that is not positive.
    """

    held_out: float = 0.2
    ridges: Sequence[float] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be between 0 and 1")
        if not self.ridges or not all(1e-4 <= ridge < math.inf for ridge in self.ridges):
            raise ValueError(f"ridges={self.ridges!r} must be finite numbers of at least 0.0001, one or more")

    def chooses(self, runs: int) -> set[int]:
        """Which of some runs choose the ridge: spread evenly over them, and never all."""
        number = min(max(1, round(self.held_out * runs)), runs - 1)
        return {(2 * place + 1) * runs // (2 * number) for place in range(number)}


def repaired(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    trials: Sequence[Trial],
    repair: Repair | None = None,
    reduce: Reduce | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What linears become when some of their inputs go and they are refitted; the model stays as it is.

    It takes, beside the model: the new weights; of every batch, what its run of the model holds while it waits before a linear
    for the others; and, of one linear at a time, at most seven float64 matrices of in_features^2.

    Args:
        model: The model.
        kept: By the name of a linear (`nn.Linear` or `Conv1D`), which of its inputs stay: bool, `[in_features]`.
        trials: The batches, two at least, of which some choose the ridge.
        repair: How; `Repair()` by default.
        reduce: Sums over ranks, where each has batches of its own.

    Returns:
        By linear, its weight, zero for what goes, and its bias, None where it has none: in its own dtype and layout. One that was
        given fewer tokens than inputs stay is not refitted, and a warning names it.

    Raises:
        ValueError: If a name is of no linear, a mask does not fit or keeps nothing, there are too few batches or tokens, or a
            linear is given NaN or infinite inputs.
    """
    repair = repair or Repair()
    linears = _check(model, kept)
    _check_batches(trials, repair, next(iter(model.parameters())).device, reduce)
    visitor = _Refit(linears, kept, trials, repair, reduce)
    with undisturbed(model):
        often = _called_often(linears, trials, reduce)
        once = {name: linear for name, linear in linears.items() if name not in often}
        for stage, sites in ((often, [Site(model, often)]), (once, find_sites(model, once, "layer"))):
            with replaced({linear: visitor.own(name) for name, linear in linears.items() if name not in stage}):
                Walk(sites, visitor, reduce)([trial.loss for trial in trials] if stage else [])
    if len(visitor.left) == len(linears):
        raise ValueError(f"batches: too few tokens that count for any refit; the first linear is {visitor.left[0]}")
    if visitor.left:
        what = f"{len(visitor.left)} linears, which are cut and not refitted: {', '.join(visitor.left)}"
        warnings.warn(f"too few tokens have come to {what}", stacklevel=2)
    return {name: (own["weight"], own.get("bias")) for name, own in ((name, visitor.own(name)) for name in linears)}


def _check(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The linears, in the order of the model's modules."""
    modules = dict(model.named_modules())
    for name, keep in kept.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear | Conv1D):
            found = "nothing" if linear is None else type(linear).__name__
            raise ValueError(f"kept: {name!r} is {found} in {type(model).__name__}, not an nn.Linear or Conv1D")
        width = _matrix(linear)[0].shape[1]
        if keep.dtype != torch.bool or keep.shape != (width,) or not keep.any():
            raise ValueError(
                f"kept[{name!r}] must be bool of shape [{width}] and keep an input at least, got {keep.dtype} of shape "
                f"{list(keep.shape)}, {int(keep.sum())} kept"
            )
    if not kept:
        raise ValueError("kept: no linear is named")
    return {name: linear for name, linear in modules.items() if name in kept}


def _check_batches(trials: Sequence[Trial], repair: Repair, device: torch.device, reduce: Reduce | None) -> None:
    counts = torch.tensor([len(trials), len(repair.chooses(len(trials)))], device=device)
    number, choosing = (counts if reduce is None else reduce(counts)).tolist()
    if not choosing:
        raise ValueError(f"batches: two on a rank are needed at least, as some are to choose the ridge; got {number} in all")


def _called_often(linears: Mapping[str, nn.Module], trials: Sequence[Trial], reduce: Reduce | None) -> dict[str, nn.Module]:
    """The linears that one run calls several times, as far as the first batch shows, of any rank."""
    calls = dict.fromkeys(linears, 0)

    def count(name: str, *_: object) -> None:
        calls[name] += 1

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(partial(count, name)).remove)
        for trial in trials[:1]:
            trial.loss()
    device = next(iter(linears.values())).get_parameter("weight").device
    flags = torch.tensor([float(number > 1) for number in calls.values()], device=device)
    often = (flags if reduce is None else reduce(flags)).tolist()
    return {name: linear for (name, linear), flag in zip(linears.items(), often, strict=True) if flag}


class _Refit:
    """Gathers moments of what linears are given, and refits each when all runs have been there."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        kept: Mapping[str, Tensor],
        trials: Sequence[Trial],
        repair: Repair,
        reduce: Reduce | None,
    ) -> None:
        self._linears, self._trials, self._reduce = linears, trials, reduce
        self._kept = {name: kept[name].to(linear.get_parameter("weight").device) for name, linear in linears.items()}
        self._ridges, self._held_out = repair.ridges, repair.chooses(len(trials))
        self._moments: dict[str, tuple[Moments, Moments]] = {}
        self._new: dict[str, dict[str, Tensor]] = {}

    @property
    def left(self) -> list[str]:
        """The linears that have not been refitted."""
        return [name for name in self._linears if name not in self._new]

    def observe(self, name: str, inputs: Tensor, run: int) -> None:
        """Adds what a linear is given."""
        keep = self._trials[run].tokens.get(name)
        if keep is not None and keep.numel() == inputs.shape[:-1].numel():
            keep = keep.reshape(inputs.shape[:-1]).to(inputs.device)
        else:
            keep = None
        self._of(name)[run in self._held_out].add(inputs, keep)

    def complete(self, site: Site) -> None:
        """Refits the linears of a site.

        Raises:
            ValueError: If what one is given is not finite.
        """
        for name in site.linears:
            fit, held_out = self._of(name)
            if self._reduce is not None:
                for sums in (*fit.tensors(), *held_out.tensors()):
                    self._reduce(sums)
            del self._moments[name]
            bad = (~(fit.products + held_out.products).diagonal().isfinite()).nonzero()
            if len(bad):
                raise ValueError(f"{name}: NaN or infinite inputs in {len(bad)} features, the first in feature {int(bad[0])}")
            keep = self._kept[name]
            if min(fit.tokens, held_out.tokens) and fit.tokens + held_out.tokens >= keep.sum():
                old = _matrix(self._linears[name])
                self._new[name] = self._as_it_lies(name, *refit_linear(*old, keep, fit, held_out, self._ridges))

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """What the linears of a site become, as they lie in memory."""
        return {name: self.own(name) for name in site.linears}

    def own(self, name: str) -> dict[str, Tensor]:
        """What a linear has become by now, as it lies in memory: with zeros for what goes at least."""
        weight, bias = _matrix(self._linears[name])
        return self._new.get(name) or self._as_it_lies(name, torch.where(self._kept[name], weight, 0), bias)

    def _as_it_lies(self, name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        linear = self._linears[name]
        dtype = linear.get_parameter("weight").dtype
        own = {"weight": (weight.t() if isinstance(linear, Conv1D) else weight).to(dtype).contiguous()}
        return own if bias is None else own | {"bias": bias.to(linear.get_parameter("bias").dtype)}

    def _of(self, name: str) -> tuple[Moments, Moments]:
        if name not in self._moments:
            keep = self._kept[name]
            self._moments[name] = Moments(len(keep), keep.device), Moments(len(keep), keep.device)
        return self._moments[name]


def _matrix(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as `[out_features, in_features]`, and the bias."""
    weight, bias = linear.get_parameter("weight").detach(), linear._parameters.get("bias")
    return weight.t() if isinstance(linear, Conv1D) else weight, None if bias is None else bias.detach()
