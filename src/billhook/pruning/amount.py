"""How much of a model is removed: a ratio for each kind of unit, or one target."""

from dataclasses import dataclass
from typing import Literal

from billhook.arguments import annotated, as_percentage, fraction, one_of, whole
from billhook.pruning.widths import RoundTo
from billhook.units.units import Per, UnitKind

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
                whole(name, ratio, 0)
            else:
                fraction(name, ratio, of="these units")
        annotated(Amount, vars(self))
        if self.heads is not None and self.kv_heads is not None:
            raise ValueError(f"heads={self.heads} and kv_heads={self.kv_heads}: give one, as a KV head takes its heads along")
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if self.blocks is not None and (others := [*(name for name in self.ratios if name != "blocks"), *targets]):
            raise ValueError(
                f"blocks={self.blocks} and {others[0]}: blocks are planned alone, and the rest of the model after that"
            )
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(targets)}: give one target")
        if targets and not self.open:
            raise ValueError(f"{targets[0]}={getattr(self, targets[0])}: nothing is left open that could be removed for it")
        if not targets and not any(self.ratios.values()):
            raise ValueError(f"nothing is asked for: give a ratio ({', '.join(RATIOS)}) or a target ({', '.join(TARGETS)})")
        for name in targets:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value <= 0 or (isinstance(value, float) and not value < 1):
                meant = as_percentage(value) if number else ""
                raise ValueError(
                    f"{name}={value!r} must be a whole number above 0, or a fraction in (0, 1) of what is there{meant}"
                )
        one_of("ranking", self.ranking, Ranking)
        for name, least in {"first": 0, "last": 0, "min_units": 1}.items():
            whole(name, getattr(self, name), least)
        if self.round_to != "auto":
            whole("round_to", self.round_to)

    @property
    def ratios(self) -> dict[str, float]:
        """The given ratios."""
        return {name: getattr(self, name) for name in RATIOS if getattr(self, name) is not None}

    @property
    def target(self) -> str | None:
        """The name of the target, if there is one."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the ratios that are found for the target."""
        given = set(self.ratios) | ({"kv_heads"} if self.heads is not None else set())
        if self.target is None:
            return ()
        return tuple(
            name for name in (("kv_heads",) if self.target == "kv_cache_bytes" else ("kv_heads", "channels")) if name not in given
        )

    @property
    def asked(self) -> dict[str, tuple[UnitKind, Per]]:
        """The ratios that matter, with the kind of unit and of score."""
        return {name: of for name, of in RATIOS.items() if self.ratios.get(name) or name in self.open}

    @property
    def kinds(self) -> list[UnitKind]:
        """The kinds of units that are asked for, in one order on every rank."""
        return list(dict.fromkeys(kind for kind, _ in self.asked.values()))

    @property
    def per(self) -> Per:
        """The heads that have scores: query heads, or KV heads."""
        return "head" if "heads" in self.asked else "kv_head"
