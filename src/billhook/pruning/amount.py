"""Pruning amounts: a ratio for each kind of unit, or a budget."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_one_of, check_types, percentage_hint
from billhook.units import Per, UnitKind, Units

KERNEL_BYTES = 16  # torch's grouped kernel of experts reads rows in pieces of this size
RoundTo = int | Literal["auto"]
MULTIPLES = (256, 128, 64, 32)
"""Preferred divisors of a row's length, best first.

K-quants of llama.cpp use blocks of 256, FP8 and other formats 128 or 64, and every llama.cpp format 32.
"""
PERCENT = 3
"""The largest change by width rounding, in percent of the original number of units."""


def round_units(
    requested: int, num_first: int, maximum: int, minimum: int = 1, unit_size: int = 1, step: int = 1, allow_more: bool = True
) -> int | None:
    """Returns the nearest number of units whose rows are a multiple of 256, 128, 64, or 32.

    The largest multiple wins whose nearest number of units differs from the requested one by at most 3% of the original units.
    Returns None if no multiple is near enough, or if rows had fewer than 256 entries.

    Args:
        requested: Number of units to keep.
        num_first: Original number of units. Fewer are kept.
        maximum: Most units to keep; never all of the original ones.
        minimum: Fewest units to keep.
        unit_size: Entries of one unit in a row, such as the head dimension.
        step: Number that the units must be a multiple of.
        allow_more: If False, never keeps more units than requested.

    >>> round_units(1229, 1536, 1536), round_units(1300, 1536, 1536), round_units(1300, 1536, 1536, allow_more=False)
    (1216, 1280, 1280)
    >>> round_units(30, 40, 40, unit_size=128)
    30
    >>> round_units(308, 384, 384), round_units(72, 96, 96)
    (None, None)
    """
    if num_first * unit_size < MULTIPLES[0]:
        return None
    highest = min(maximum, num_first - 1) if allow_more else min(maximum, num_first - 1, requested)
    for multiple in MULTIPLES:
        units = math.lcm(multiple // math.gcd(multiple, unit_size), step)  # the fewest units whose rows are a multiple
        below = requested // units * units
        near = [number for number in (below + units, below) if minimum <= number <= highest]
        number = min(near, key=lambda number: abs(number - requested), default=None)  # of two equally near, the higher
        if number is not None and 100 * abs(number - requested) <= PERCENT * num_first:
            return number
    return None


def multiple_of(length: int) -> int:
    """Returns the largest of `MULTIPLES` that divides a length, or 1.

    >>> multiple_of(1280), multiple_of(1216), multiple_of(1229)
    (256, 64, 1)
    """
    return next((multiple for multiple in MULTIPLES if length % multiple == 0), 1)


def unit_length(units: Units, per: Per = "head") -> int:
    """Returns the number of row entries of a unit; 0 if units do not shorten rows."""
    if units.kind in ("channel", "residual", "token"):
        return 1
    return int((units.index >= 0).sum()) // units.count(per) if units.kind == "head" else 0


def divides_among_devices(kv_heads: int) -> bool:
    """Returns whether a number of KV heads can be divided among 2, 4, and 8 devices.

    >>> [number for number in range(1, 33) if divides_among_devices(number)]
    [1, 2, 4, 8, 16, 24, 32]
    """
    return all(kv_heads % devices == 0 or devices % kv_heads == 0 for devices in (2, 4, 8))


def round_kv_heads(kept: int, count: int, minimum: int = 1) -> int:
    """Returns the nearest number of KV heads that divides among devices, or all of them.

    Of two equally near numbers, returns the higher.

    >>> round_kv_heads(7, 8), round_kv_heads(3, 8), round_kv_heads(26, 32), round_kv_heads(2, 3)
    (8, 4, 24, 2)
    """
    options = [number for number in range(count, minimum - 1, -1) if number == count or divides_among_devices(number)]
    return min(options, key=lambda number: abs(number - kept))


def kernel_multiple(model: nn.Module, units: Units) -> int:
    """Returns the multiple that the expert kernel requires of these units, or 1."""
    if units.kind not in ("channel", "residual") or not isinstance(model, PreTrainedModel):
        return 1
    for member in units.members:
        module, weight = model.get_submodule(member.name.rpartition(".")[0]), model.get_parameter(member.name)
        if weight.dim() == 3 and {"has_gate", "is_transposed"} <= vars(module).keys():
            step = KERNEL_BYTES // weight.element_size()
            grouped = model.get_correct_experts_implementation(None) == "grouped_mm"
            return step if grouped and not units.count() % step else 1
    return 1


Ranking = Literal["layer", "global"]

RATIOS: dict[str, tuple[UnitKind, Per]] = {
    "heads": ("head", "head"),
    "kv_heads": ("head", "kv_head"),
    "channels": ("channel", "head"),
    "residual": ("residual", "head"),
    "experts": ("expert", "head"),
    "blocks": ("block", "head"),
    "tokens": ("token", "head"),
}
TARGETS = ("params", "flops", "kv_cache_bytes", "bytes")


@dataclass(frozen=True)
class Amount:
    """How much to remove: a ratio for each kind of unit, or a single budget.

    A ratio is a fraction in [0, 1) of the units in blocks that are not protected, rounded down. A budget is the most that may
    remain: a number (int), or a fraction (float in 0..1) of the model. To meet a budget, billhook removes only channels if at
    most 52% of them are enough, and KV heads and channels in equal ratios otherwise. For `kv_cache_bytes` it removes only KV
    heads. Ratios that are set are kept.

    Args:
        heads: Fraction of query heads to remove, the same number from every KV head.
        kv_heads: Fraction of KV heads to remove, with their query heads. Without grouped queries, fraction of the heads.
        channels: Fraction of MLP channels to remove.
        residual: Fraction of hidden dimensions (`hidden_size`) to remove.
        experts: Fraction of experts to remove, with their router rows.
        blocks: Fraction (float) or number (int) of blocks to remove from each stack. Cannot be combined with other units.
        tokens: Fraction of the vocabulary to remove: the tokens that the calibration data has, and the model expects in it,
            least. Tokens that text cannot do without stay, such as bytes and special tokens. The tokenizer must follow
            (`plan.trim_tokenizer`).
        params: Budget: maximum number (int) or fraction (float) of parameters.
        flops: Budget: FLOPs of the forward pass, per token or, for image models, per image.
        kv_cache_bytes: Budget: bytes of the KV cache per token.
        bytes: Budget: bytes of all parameters.
        ranking: `"layer"` removes the same number from every module (uniform). `"global"` removes the lowest scores of all
            modules.
        normalize: If True, divides the scores of each module by their L2 norm. Matters only for `ranking="global"`.
        first: Number of blocks to protect at the start of each stack.
        last: Number of blocks to protect at the end of each stack.
        round_to: Width rounding: sizes become multiples of this. `"auto"` uses the largest of 256, 128, 64, and 32 whose nearest
            multiple differs by at most 3% of the original units, also for heads times head dimension; for a budget, the nearest
            multiple below. It rounds nothing if no multiple is near enough or rows had fewer than 256 entries. An int rounds
            channels and hidden dimensions up to its multiples; 1 turns rounding off.
        min_units: Fewest units that remain in each module.

    Raises:
        ValueError: If a value is not legal, nothing would be removed, or two arguments contradict each other.

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
    tokens: float | None = None
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
            raise ValueError(
                f"heads={self.heads} and kv_heads={self.kv_heads} cannot be combined, because removing a KV head removes its "
                "query heads. Set one of them."
            )
        targets = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        other_names = [name for name in (*self.ratios, *targets) if name != "blocks"]
        if self.blocks is not None and other_names:
            raise ValueError(
                f"blocks={self.blocks} cannot be combined with {other_names[0]}. Remove the blocks first, then the other units."
            )
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(targets)} cannot be combined. Set one budget.")
        if not targets and not any(self.ratios.values()):
            raise ValueError(f"nothing to remove: set a ratio ({', '.join(RATIOS)}) or a budget ({', '.join(TARGETS)})")
        for name, value in targets.items():
            if not self.open_ratios:
                units, ratios = "KV heads (with their query heads)", "heads= and kv_heads="
                if name != "kv_cache_bytes":
                    units, ratios = f"{units} and channels", f"{ratios}, or channels=,"
                raise ValueError(f"{name}={value} cannot be met: it removes only {units}. Leave {ratios} unset.")
            if value <= 0 or (isinstance(value, float) and not value < 1):
                hint = percentage_hint(value)
                raise ValueError(f"{name}={value!r} must be a whole number above 0, or a fraction of the model in (0, 1){hint}")
        check_one_of("ranking", self.ranking, Ranking)
        for name, least in {"first": 0, "last": 0, "min_units": 1}.items():
            check_int(name, getattr(self, name), least)
        if self.round_to != "auto":
            check_int("round_to", self.round_to)

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios that are set."""
        return {name: getattr(self, name) for name in RATIOS if getattr(self, name) is not None}

    @property
    def target(self) -> str | None:
        """The name of the budget, or None."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def open_ratios(self) -> tuple[str, ...]:
        """Names of the ratios that are searched to meet the budget."""
        if self.target is None:
            return ()
        names = ("kv_heads",) if self.target == "kv_cache_bytes" else ("kv_heads", "channels")
        heads = ("kv_heads",) if self.heads is not None else ()  # removing a KV head removes its query heads
        return tuple(name for name in names if name not in (*self.ratios, *heads))

    @property
    def requested(self) -> dict[str, tuple[UnitKind, Per]]:
        """The ratios that are set or searched, with their kind of unit and score."""
        return {name: of for name, of in RATIOS.items() if self.ratios.get(name) or name in self.open_ratios}

    @property
    def kinds(self) -> list[UnitKind]:
        """The kinds of units to remove, in the same order on every rank."""
        return list(dict.fromkeys(kind for kind, _ in self.requested.values()))

    @property
    def per(self) -> Per:
        """Kind of heads that are scored: query heads or KV heads."""
        return "head" if "heads" in self.requested else "kv_head"
