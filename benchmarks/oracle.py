"""Whether a structure is true, by running the model: units permuted in all members change nothing, in all but one they do."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from billhook.tracing.axes import crossed
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member
from billhook.tracing.show import name_pattern

TOLERANCE = 1e-5  # relative; RMSNorm computes in float32 inside transformers, so not 1e-12
ROUNDING = 30  # times the effect of changing every weight in its last float32 digit; some models magnify that


@dataclass(frozen=True)
class Finding:
    """What came out for one group."""

    group: Group
    error: float
    tolerance: float
    needless: tuple[Member, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the permutation changed no more than rounding does."""
        return self.error < self.tolerance


def randomise(model: nn.Module) -> None:
    """Every parameter random, norms and biases too, so that no member is a no-op."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0) if p.dim() <= 1 else 0.3 * noise)
        for p in model.buffers():  # statistics of batch norms, corrections of routers
            if p.dim() == 1 and p.is_floating_point() and p.numel() and p.unique().numel() == 1:
                p.add_(torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def answer(output: Any) -> Tensor:
    """What a model says first."""
    fields = list(output.values()) if isinstance(output, Mapping) else output
    if getattr(output, "logits", None) is not None:
        fields = output.logits
    tensors = [v for v in tree_leaves(fields) if isinstance(v, Tensor)]
    return next((v for v in tensors if v.is_floating_point()), tensors[0].double())


def permuted(tensor: Tensor, dim: int, index: np.ndarray, order: np.ndarray) -> Tensor:
    """A tensor in which unit i stands where `order[i]` stood, at every place that a unit has."""
    places = [np.flatnonzero(index == unit) for unit in range(len(order))]
    taken = np.arange(len(index))
    for unit, other in enumerate(order):
        taken[places[unit]] = places[other]
    return tensor.index_select(dim, torch.from_numpy(taken))


def check(
    model: nn.Module, structure: Structure, run: Callable[[], Tensor], groups: Sequence[Group], necessity: float = 0
) -> Iterator[Finding]:
    """Permutes the units of each group in a real model and compares what it answers.

    Those of groups with at most so many members as `necessity` says are also permuted in all members but one.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    rng = np.random.default_rng(0)
    with torch.no_grad():
        base = run()
        tolerance = max(TOLERANCE, min(1e-3, ROUNDING * _rounding(tensors, base, run)))
        for group in groups:
            if any(crossed(member.axis, group.leaf) for member in group.members):
                yield Finding(group, float("inf"), tolerance)
                continue
            order = np.roll(np.arange(group.size), 1) if group.size < 4 else rng.permutation(group.size)
            if (order == np.arange(group.size)).all():
                order = np.roll(order, 1)
            yield _finding(tensors, group, order, base, run, tolerance, len(group.members) <= necessity)


def _finding(
    tensors: Mapping[str, Tensor],
    group: Group,
    order: np.ndarray,
    base: Tensor,
    run: Callable[[], Tensor],
    tolerance: float,
    necessity: bool,
) -> Finding:
    saved = {member.name: tensors[member.name].data for member in group.members}

    def error(members: Sequence[Member]) -> float:
        try:
            for member in members:
                tensor = tensors[member.name]
                tensor.data = permuted(tensor.data, member.dim, group.index(member), order)
            out = run()
        finally:
            for name, data in saved.items():
                tensors[name].data = data
        if "output" in group.flags and out.shape[-1] == group.size:
            out = out[..., np.argsort(order)]
        return difference(out, base)

    whole = error(group.members)
    needless: list[Member] = []
    if necessity and whole < tolerance:
        needless = [m for m in group.members if error([other for other in group.members if other is not m]) < tolerance]
    return Finding(group, whole, tolerance, tuple(needless))


def difference(out: Tensor, base: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((out - base).abs().nan_to_num().max() / base.abs().nan_to_num().max().clamp_min(1e-30))


def _rounding(tensors: Mapping[str, Tensor], base: Tensor, run: Callable[[], Tensor]) -> float:
    """How much the answer changes when every weight changes by a float32 digit."""
    generator = torch.Generator().manual_seed(1)
    saved = {name: tensor.data for name, tensor in tensors.items() if tensor.is_floating_point()}
    try:
        for name, data in saved.items():
            noise = torch.randn(data.shape, generator=generator, dtype=torch.float64).to(data.dtype)
            tensors[name].data = data * (1 + torch.finfo(torch.float32).eps * noise)
        return difference(run(), base)
    finally:
        for name, data in saved.items():
            tensors[name].data = data


def slice_error(
    model: nn.Module, group: Group, run: Callable[[nn.Module], Tensor], unit: int = 0
) -> tuple[float, tuple[str, ...]]:
    """How far a model without a unit is from the same model in which nobody reads the unit.

    Whole-number attributes that counted units or widths are looked for, and made to count fewer: none, each, each pair, and those
    that equal a width, also with one or two others.

    Returns:
        The relative difference, and the attributes that had to follow (`module.attribute`).
    """
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    best: tuple[float, tuple[str, ...]] = (float("inf"), ())
    with torch.no_grad():
        tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
        for member in group.members:
            if member.reads:
                tensors[member.name].index_fill_(member.dim, torch.from_numpy(group.positions(member, [unit])), 0.0)
        base = run(masked)
        tensors = dict([*cut.named_parameters(), *cut.named_buffers()])
        for member in group.members:
            kept = torch.from_numpy(np.flatnonzero(group.index(member) != unit))
            tensors[member.name].data = tensors[member.name].data.index_select(member.dim, kept)
        found = _counting(cut, group)
        for names in _tries(found, {member.axis.size for member in group.members}):
            with _fewer([change for name in names for change in found[name]]):
                try:
                    error = difference(run(cut), base)
                except (RuntimeError, ValueError, IndexError, ZeroDivisionError, TypeError):
                    continue
            best = min(best, (error, names))
            if error < TOLERANCE:
                break
    return best


Change = tuple[Any, str, Any, Any]


def _tries(found: Mapping[str, Sequence[Change]], widths: set[int]) -> Iterator[tuple[str, ...]]:
    wide = tuple(
        name for name, changes in found.items() if all(type(before) is int and before in widths for _, _, before, _ in changes)
    )
    for count in (0, 1, 2):
        for names in itertools.combinations(found, count):
            yield names
            if wide and not set(names) & set(wide):
                yield (*wide, *names)


def _counting(model: nn.Module, group: Group) -> dict[str, list[Change]]:
    """Attributes of the modules around a group, and fields of their configs, that count its units or are as wide as a member."""
    around = {
        member.name.rsplit(".", depth)[0] for member in group.members for depth in (1, 2, 3) if member.name.count(".") >= depth
    }
    widths = {member.axis.size: len(np.flatnonzero(group.index(member) != 0)) for member in group.members}

    def fewer(value: object) -> int | None:
        if type(value) is not int or value <= 1:
            return None
        if value in widths:
            return widths[value]
        return value // group.size * (group.size - 1) if value % group.size == 0 else None

    found: dict[str, list[Change]] = {}
    for path in sorted(around):
        module = model.get_submodule(path)
        config = vars(module).get("config")
        for name, value in vars(module).items():
            if (less := fewer(value)) is not None:
                found.setdefault(f"{name_pattern(path)}.{name}", []).append((module, name, value, less))
        for name, value in vars(config).items() if config is not None else ():
            if (less := fewer(value)) is not None:
                own = copy.copy(config)
                setattr(own, name, less)
                found.setdefault(f"{name_pattern(path)}.config.{name}", []).append((module, "config", config, own))
    return found


@contextmanager
def _fewer(changes: Sequence[Change]) -> Iterator[None]:
    try:
        for owner, name, _, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value, _ in changes:
            setattr(owner, name, value)
