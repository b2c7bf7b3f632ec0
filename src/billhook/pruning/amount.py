"""How much of a model is removed: a ratio for each kind of unit, or one target."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_one_of, check_types, percentage_hint
from billhook.serving.engines import GPUS, MULTIPLES, multiple_of, shares
from billhook.units.units import PLURAL, Per, UnitKind, Units

RoundTo = int | Literal["auto"]
PERCENT = 3
"""So much of the units that there were may stay more or fewer than was asked for."""


def round_units(
    wanted: int, first: int, most: int | None = None, least: int = 1, each: int = 1, step: int = 1, more: bool = True
) -> int | None:
    """Returns how many units stay instead of so many: as many as make rows a multiple of the largest of `MULTIPLES` near enough.

    Of each multiple the nearest number counts, and it is near enough if it differs from what was asked for by at most 3 % of the
    units that there were at first. Where rows were shorter than 256, or no multiple is near enough, there is none.

    Args:
        wanted: How many are asked for.
        first: How many there were at first; fewer stay.
        most: The most that may stay; by default all but one.
        least: The fewest that may stay.
        each: The length of one unit in a row, as the width of a head.
        step: The number that units must be a multiple of.
        more: Whether more may stay than was asked for.

    >>> round_units(1229, 1536), round_units(1300, 1536), round_units(1300, 1536, more=False), round_units(30, 40, each=128)
    (1216, 1280, 1280, 30)
    >>> round_units(308, 384), round_units(72, 96)
    (None, None)
    """
    if first * each < MULTIPLES[0]:
        return None
    highest = first - 1 if most is None else min(most, first - 1)
    for multiple in MULTIPLES:
        units = math.lcm(multiple // math.gcd(multiple, each), step)  # so many make rows a multiple
        number = nearest_multiple(wanted, units, least, highest, more)
        if number is not None and 100 * abs(number - wanted) <= PERCENT * first:
            return number
    return None


def nearest_multiple(wanted: int, step: int, least: int, most: int, more: bool = True) -> int | None:
    """Returns the multiple of a step within bounds that is nearest to a number, the higher of two; None if there is none.

    >>> nearest_multiple(1229, 256, 1, 1535), nearest_multiple(1229, 256, 1, 1535, more=False)
    (1280, 1024)
    >>> nearest_multiple(24, 16, 1, 47), nearest_multiple(24, 64, 1, 47)
    (32, None)
    """
    below = wanted // step * step
    options = [number for number in (below + step, below) if least <= number <= most and (more or number <= wanted)]
    return min(options, key=lambda number: abs(number - wanted), default=None)


def nearby_counts(wanted: int, kept: int, now: int, least: int = 1) -> dict[int, int]:
    """Returns the nearest multiples of `MULTIPLES` that were not taken, each with the largest that it is a multiple of.

    >>> nearby_counts(1229, 1216, 1536)
    {1280: 256}
    """
    near = [nearest_multiple(wanted, multiple, least, now - 1) for multiple in MULTIPLES]
    return {number: multiple_of(number) for number in near if number is not None and number != kept}


def rounding_multiple(count: int) -> int:
    """Returns the largest of `MULTIPLES` to which any number of so many units can be rounded down; 1 if none is so small.

    >>> rounding_multiple(11008), rounding_multiple(1536), rounding_multiple(384)
    (256, 32, 1)
    """
    return next((multiple for multiple in MULTIPLES if 100 * multiple <= PERCENT * count), 1)


def unit_length(units: Units, per: Per = "head") -> int:
    """Returns how much of a row one unit takes: of heads as many as they are wide; 0 where rows are of something else."""
    if units.kind in ("channel", "residual"):
        return 1
    return int((units.index >= 0).sum()) // units.count(per) if units.kind == "head" else 0


OTHER = ("units", "multiple", "more_parameters")
"""What plain data calls the numbers of another length."""


@dataclass(frozen=True)
class RowLength:
    """How long rows have become where units were removed; `print` shows a line.

    Attributes:
        kind: The kind of the units.
        places: In how many places.
        each: The length of one unit in a row, as the width of a head.
        asked: How many units were asked for.
        kept: How many stay.
        multiple: The largest of 256, 128, 64 and 32 that the rows are a multiple of; 1 if they are of none.
        others: Numbers of units that could stay instead, of which multiple rows would be then, and how many parameters the model
            would have more.
    """

    kind: UnitKind
    places: int
    each: int
    asked: int
    kept: int
    multiple: int
    others: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return vars(self) | {"others": [dict(zip(OTHER, other, strict=True)) for other in self.others]}

    def __str__(self) -> str:
        rows = "" if self.each == 1 else f" (head dimension {self.each}), rows of {self.kept * self.each:,}"
        by = f"a multiple of {self.multiple}" if self.multiple > 1 else "no multiple of 32 is near enough"
        parts = [f"{self.kept:,} {PLURAL[self.kind]}{rows}: {by}"]
        if self.asked != self.kept:
            parts.append(f"{self.asked:,} were asked for")
        for units, multiple, more in self.others:
            parameters = f"{abs(more):,} parameters {'more' if more > 0 else 'fewer'}"
            parts.append(f"{units:,} would be a multiple of {multiple}, with {parameters}")
        return "; ".join(parts)


def row_lengths_from_json(plain: Iterable[Mapping[str, Any]]) -> tuple[RowLength, ...]:
    """Makes row lengths of their plain data; refuses what is none."""
    try:
        return tuple(
            RowLength(**{**row, "others": tuple(tuple(other[name] for name in OTHER) for other in row["others"])})
            for row in plain
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"plan: rows is {str(plain)[:80]!r}, and must be as to_json returns it") from error


def divides_among_devices(kv_heads: int) -> bool:
    """Tells whether so many KV heads can be divided among 2, 4 and 8 devices.

    >>> [number for number in range(1, 33) if divides_among_devices(number)]
    [1, 2, 4, 8, 16, 24, 32]
    """
    return all(shares(kv_heads, gpus) for gpus in GPUS)


def round_kv_heads(kept: int, count: int, least: int = 1) -> int:
    """Returns the number of KV heads nearest to one that suits, or all of them; the higher of two.

    >>> round_kv_heads(7, 8), round_kv_heads(3, 8), round_kv_heads(26, 32), round_kv_heads(2, 3)
    (8, 4, 24, 2)
    """
    options = [number for number in range(count, least - 1, -1) if number == count or divides_among_devices(number)]
    return min(options, key=lambda number: abs(number - kept))


def uneven_devices_note(kv_heads: int) -> str:
    """Returns the words for a number that does not suit."""
    return f"{kv_heads} KV heads cannot be divided among 2, 4 and 8 devices, as 1, 2, 4 or a multiple of 8 can"


def kernel_multiple(model: nn.Module, units: Units) -> int:
    """Returns the number that the units must be a multiple of; 1 where no such kernel reads them, or it takes none now."""
    if units.kind not in ("channel", "residual") or not isinstance(model, PreTrainedModel):
        return 1
    for member in units.members:
        module, weight = model.get_submodule(member.name.rpartition(".")[0]), model.get_parameter(member.name)
        if weight.dim() == 3 and {"has_gate", "is_transposed"} <= vars(module).keys():
            step = max(_kernel_bytes() // weight.element_size(), 1)
            grouped = model.get_correct_experts_implementation(None) == "grouped_mm"
            return step if grouped and not units.count() % step else 1
    return 1


@cache
def _kernel_bytes() -> int:
    """Asks torch's kernel, on meta tensors, of which number of bytes rows must be a multiple."""
    for width in range(1, 65):
        rows, weights = (torch.empty(*size, width, dtype=torch.bfloat16, device="meta") for size in ((2,), (2, 64)))
        try:
            ends = torch.empty(2, dtype=torch.int32, device="meta")
            torch.nn.functional.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        except RuntimeError:
            continue
        return 2 * width
    return 1


Ranking = Literal["layer", "global"]

RATIOS: dict[str, tuple[UnitKind, Per]] = {
    "heads": ("head", "head"),
    "kv_heads": ("head", "kv_head"),
    "channels": ("channel", "head"),
    "residual": ("residual", "head"),
    "experts": ("expert", "head"),
    "blocks": ("block", "head"),
}
TARGETS = ("params", "flops", "kv_cache_bytes", "bytes")


@dataclass(frozen=True)
class Amount:
    """How much is removed: a ratio for each kind of unit, or one target, for which the ratios that were left open are found.

    A ratio is a fraction in [0, 1) of the units that are there, in blocks that are not protected, rounded down. A target is the
    most that may be left: a number (int), or a fraction (float in 0..1) of what is there now. For it channels alone are removed,
    as far as half of them are enough (0.52), and KV heads and channels in equal ratios where they are not; for
    `kv_cache_bytes` KV heads alone. A ratio that is given holds.

    Args:
        heads: Ratio of the query heads, as many of each KV head.
        kv_heads: Ratio of the KV heads, with the query heads that they serve; of a model without grouped queries, of the heads.
        channels: Ratio of the channels of feed-forwards.
        residual: Ratio of the channels of the residual stream (the hidden size).
        experts: Ratio of the experts, with their row of the router.
        blocks: Ratio of the whole blocks of each stack, or their number (int); nothing else may be asked for with it.
        params: Target: parameters.
        flops: Target: operations of the forward pass, per token; of a model of images, of one image.
        kv_cache_bytes: Target: bytes that the key/value cache takes for each token.
        bytes: Target: bytes of all parameters.
        ranking: `"layer"`: as many are removed in each layer, so that layers stay alike; `"global"`: the lowest of all layers.
        normalize: Whether the scores of each place are divided by their L2 norm, which matters for `ranking="global"` alone.
        first: Blocks at the beginning of each stack that are kept, with their heads, channels and experts.
        last: Blocks at the end of each stack that are kept.
        round_to: What the number of channels that remain, of feed-forwards and residual, is a multiple of. `"auto"`: the largest
            of 256, 128, 64 and 32 whose nearest multiple differs from what was asked for by at most 3 % of the units that there
            were, also of heads times their width; for a target, by which no more may be left, the nearest below. Nothing is
            rounded where none is so near, or rows were shorter than 256. A number (int): multiples of it, always of no fewer
            channels than asked for; 1: nothing is rounded.
        min_units: The fewest units that remain in each place.

    Raises:
        ValueError: If a number is not legal, nothing is asked for, or two requests contradict each other.

    Example:
        >>> import billhook as bh
        >>> amount = bh.Amount(params=0.8, first=1, last=1)
        >>> bh.Amount(heads=1.0)
        Traceback (most recent call last):
        ValueError: heads=1.0 must be a fraction of these units in [0, 1)
    """

    heads: float | None = None
    kv_heads: float | None = None
    channels: float | None = None
    residual: float | None = None
    experts: float | None = None
    blocks: int | float | None = None
    params: int | float | None = None
    flops: int | float | None = None
    kv_cache_bytes: int | float | None = None
    bytes: int | float | None = None
    ranking: Ranking = "layer"
    normalize: bool = False
    first: int = 0
    last: int = 0
    round_to: RoundTo = "auto"
    min_units: int = 1

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            if name == "blocks" and type(ratio) is int:
                check_int(name, ratio, 0)
            else:
                check_fraction(name, ratio, of="these units")
        check_types(Amount, vars(self))
        if self.heads is not None and self.kv_heads is not None:
            raise ValueError(f"heads={self.heads} and kv_heads={self.kv_heads}: give one, as a KV head takes its heads along")
        targets = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if self.blocks is not None and (others := [*(name for name in self.ratios if name != "blocks"), *targets]):
            raise ValueError(
                f"blocks={self.blocks} and {others[0]}: blocks are planned alone, and the rest of the model after that"
            )
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(targets)}: give one target")
        if not targets and not any(self.ratios.values()):
            raise ValueError(f"nothing is asked for: give a ratio ({', '.join(RATIOS)}) or a target ({', '.join(TARGETS)})")
        for name, value in targets.items():
            if not self.open_ratios:
                raise ValueError(f"{name}={value}: nothing is left open that could be removed for it")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value <= 0 or (isinstance(value, float) and not value < 1):
                meant = percentage_hint(value) if number else ""
                raise ValueError(
                    f"{name}={value!r} must be a whole number above 0, or a fraction in (0, 1) of what is there{meant}"
                )
        check_one_of("ranking", self.ranking, Ranking)
        for name, least in {"first": 0, "last": 0, "min_units": 1}.items():
            check_int(name, getattr(self, name), least)
        if self.round_to != "auto":
            check_int("round_to", self.round_to)

    @property
    def ratios(self) -> dict[str, float]:
        """The given ratios."""
        return {name: getattr(self, name) for name in RATIOS if getattr(self, name) is not None}

    @property
    def target(self) -> str | None:
        """The name of the target, if there is one."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def open_ratios(self) -> tuple[str, ...]:
        """Names of the ratios that are found for the target."""
        if self.target is None:
            return ()
        names = ("kv_heads",) if self.target == "kv_cache_bytes" else ("kv_heads", "channels")
        heads = ("kv_heads",) if self.heads is not None else ()  # a KV head takes its heads along
        return tuple(name for name in names if name not in (*self.ratios, *heads))

    @property
    def requested(self) -> dict[str, tuple[UnitKind, Per]]:
        """The ratios that matter, with the kind of unit and of score."""
        return {name: of for name, of in RATIOS.items() if self.ratios.get(name) or name in self.open_ratios}

    @property
    def kinds(self) -> list[UnitKind]:
        """The kinds of units that are asked for, in one order on every rank."""
        return list(dict.fromkeys(kind for kind, _ in self.requested.values()))

    @property
    def per(self) -> Per:
        """The heads that have scores: query heads, or KV heads."""
        return "head" if "heads" in self.requested else "kv_head"
