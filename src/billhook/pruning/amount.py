"""How much of a model goes: a ratio for each kind of unit, or one target."""

from dataclasses import dataclass
from typing import Literal, get_args

from billhook.units.units import Per, UnitKind

Ranking = Literal["layer", "global"]

RATIOS: dict[str, tuple[UnitKind, Per]] = {
    "heads": ("head", "head"),
    "kv_heads": ("head", "kv_head"),
    "channels": ("channel", "head"),
    "residual": ("residual", "head"),
    "experts": ("expert", "head"),
}
TARGETS = ("params", "flops", "kv_cache_bytes", "bytes")


@dataclass(frozen=True)
class Amount:
    """How much goes: a ratio for each kind of unit, or one target, for which the ratios are found that were left open.

    A ratio is a fraction in [0, 1) of the units that are there, of those in blocks that are not protected, rounded down. A target
    is what is left at most: a number (int), or a fraction (float in 0..1) of what is there now. KV heads and channels go for it
    in equal ratios, unless theirs is given; for `kv_cache_bytes` KV heads alone.

    Args:
        heads: Query heads, as many of each KV head.
        kv_heads: KV heads, with the query heads that they serve; of a model without grouped queries, heads.
        channels: Channels of feed-forward blocks.
        residual: Channels of the residual stream (the hidden size).
        experts: Experts, with their row of the router.
        params: Target: parameters.
        flops: Target: operations of the forward pass, per token.
        kv_cache_bytes: Target: bytes that the key/value cache takes for each token.
        bytes: Target: bytes of all parameters.
        ranking: `"layer"`: as many go in each layer, so that layers stay alike; `"global"`: the lowest of all layers, by kind.
        first: Blocks at the beginning of each stack that keep their heads, channels and experts.
        last: Blocks at the end of each stack that do.
        round_to: The number of channels, of feed-forward and residual, that stay is a multiple of it.
        min_units: How many units stay in each place, at least.

    Raises:
        ValueError: If a number is not legal, nothing is asked for, or two things that are contradict each other.
    """

    heads: float | None = None
    kv_heads: float | None = None
    channels: float | None = None
    residual: float | None = None
    experts: float | None = None
    params: int | float | None = None
    flops: int | float | None = None
    kv_cache_bytes: int | float | None = None
    bytes: int | float | None = None
    ranking: Ranking = "layer"
    first: int = 0
    last: int = 0
    round_to: int = 1
    min_units: int = 1

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                raise ValueError(f"{name}={ratio!r} must be a fraction of these units in [0, 1)")
        if self.heads is not None and self.kv_heads is not None:
            raise ValueError(f"heads={self.heads} and kv_heads={self.kv_heads}: give one, as a KV head takes its heads along")
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(targets)}: give one target")
        if targets and not self.open:
            raise ValueError(f"{targets[0]}={getattr(self, targets[0])}: nothing is left open that could go for it")
        if not targets and not any(self.ratios.values()):
            raise ValueError(f"nothing is asked for: give a ratio ({', '.join(RATIOS)}) or a target ({', '.join(TARGETS)})")
        for name in targets:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value <= 0 or (isinstance(value, float) and not value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number above 0, or a fraction in (0, 1) of what is there")
        if self.ranking not in get_args(Ranking):
            raise ValueError(f"ranking={self.ranking!r} must be one of {', '.join(get_args(Ranking))}")
        for name, least in {"first": 0, "last": 0, "round_to": 1, "min_units": 1}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, {least} at least")

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios that are given."""
        return {name: getattr(self, name) for name in RATIOS if getattr(self, name) is not None}

    @property
    def target(self) -> str | None:
        """The name of the target, if there is one."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def open(self) -> tuple[str, ...]:
        """The ratios that are found for the target."""
        given = set(self.ratios) | ({"kv_heads"} if self.heads is not None else set())
        if self.target is None:
            return ()
        return tuple(
            name for name in (("kv_heads",) if self.target == "kv_cache_bytes" else ("kv_heads", "channels")) if name not in given
        )

    @property
    def asked(self) -> dict[str, tuple[UnitKind, Per]]:
        """The ratios that matter, with the kind of unit and what there is a score for."""
        return {name: of for name, of in RATIOS.items() if self.ratios.get(name) or name in self.open}
