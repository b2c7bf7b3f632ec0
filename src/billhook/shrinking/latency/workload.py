"""Says what a model does while it is timed, as `billhook bench` measures it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from billhook.arguments import annotated, whole
from billhook.model.config_fields import text_config
from billhook.report.generation import CacheKind, generates
from billhook.report.speed import Phase, check_speed, measure_speed

CONTEXT = 512


@dataclass(frozen=True)
class Workload:
    """Says what a model does while it is timed: by default it writes, one token after the other, after a prompt of 512 tokens.

    Args:
        phase: `"decode"`: writing a token; `"prefill"`: reading the prompts. By default it writes, or it reads where a model
            predicts no next token.
        batch_size: Sequences at once.
        context: Tokens of each prompt; by default 512, or as many as the model reads.
        new_tokens: Tokens that are written after the prompt, in each round.
        rounds: How often a model and the dense one are measured, in turn; medians count.
        cache: How the key/value cache is kept: see `Generation`.

    Raises:
        ValueError: If a number is out of range.

    >>> from billhook.shrinking.latency.workload import Workload
    >>> print(Workload("prefill", batch_size=8, context=1024))
    reading prompts of 1,024 tokens, 8 at once
    """

    phase: Phase | None = None
    batch_size: int = 1
    context: int | None = None
    new_tokens: int = 8
    rounds: int = 11
    cache: CacheKind = "static"

    def __post_init__(self) -> None:
        annotated(Workload, vars(self))
        for name, least in {"batch_size": 1, "context": 2, "new_tokens": 1, "rounds": 1}.items():
            whole(name, least if (value := getattr(self, name)) is None else value, least)

    def of(self, model: PreTrainedModel) -> "Workload":
        """Decides what is left open, for one model; refuses a model that cannot do it."""
        phase: Phase = self.phase or ("decode" if generates(model) else "prefill")
        longest = getattr(text_config(model.config), "max_position_embeddings", None) or CONTEXT + self.new_tokens
        room = longest - (self.new_tokens if generates(model) else 0)
        own = replace(self, phase=phase, context=self.context or max(min(CONTEXT, room), 2))
        check_speed([model], *own._given)
        return own

    def seconds(self, models: Sequence[PreTrainedModel]) -> list[tuple[float, ...]]:
        """Measures models side by side: by model, the seconds of each round."""
        sizes, contexts, new_tokens, rounds, warmup, cache, phases = self._given
        rows = measure_speed(models, sizes, contexts, new_tokens, rounds, warmup, cache, phases)
        return [row.seconds for row in rows]

    @property
    def _given(self) -> tuple[list[int], list[int], int, int, int, CacheKind, list[Phase]]:
        phases: list[Phase] = [self.phase or "decode"]
        return [self.batch_size], [self.context or CONTEXT], self.new_tokens, self.rounds, 1, self.cache, phases

    def __str__(self) -> str:
        prompts = f"{'prompts' if self.batch_size > 1 else 'a prompt'} of {self.context or CONTEXT:,} tokens"
        at_once = f", {self.batch_size} at once" if self.batch_size > 1 else ""
        return f"{'reading' if self.phase == 'prefill' else 'writing a token after'} {prompts}{at_once}"
