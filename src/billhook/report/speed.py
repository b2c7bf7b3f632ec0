"""How fast models read prompts and decode, side by side in interleaved rounds, and the ideal speed-up."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.arguments import check_int, check_one_of, check_types
from billhook.engine.memory import resident
from billhook.model.config_fields import text_config
from billhook.model.costs import meta_copy
from billhook.report.generation import CacheKind, Generation, cache_name, generates

RESET = Path("/proc/self/clear_refs")


class Peak:
    """Within `with`, follows the memory of a device.

    On CUDA that is torch's allocated memory. On a CPU it is the resident memory of the process, which the system counts (Linux
    only): memory that was freed before, kept by the process and used again is not seen. Then `rise` is by how many bytes the
    peak exceeds the memory in use before; None where nothing counts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rise: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before = resident() if _forget_peak() else None
        else:
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            most = torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM") or 0
            self.rise = max(most - self._before, 0)


def _forget_peak() -> bool:
    """Resets the system's count of this process's peak, and says whether that worked."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Timing:
    """Time and memory that one model took for one phase at one batch size and context.

    Attributes:
        model: Its number among the models; 0 is the reference.
        phase: "prefill": all prompts in one go. "decode": a step, which gives each sequence a token.
        batch_size: Sequences.
        context: Tokens of each prompt.
        seconds: For each round: seconds of the whole prefill, or of a decoding step, as the mean over the steps of the round.
        ratios: For each round: the reference's seconds over the model's; above 1 is faster.
        weight_bytes: Bytes of the weights that a step reads.
        cache_bytes: Bytes of all tensors in the key/value cache; 0 where there is none.
        cache_tokens: Tokens of each sequence that the cache has room for.
        flops: Floating-point operations of the prefill, attention as a whole square; None where the model cannot run on meta
            tensors.
        ideal: The ideal speed-up against the reference; None where it is not known.
        peak_bytes: The most memory taken: weights, cache, and the phase's own needs; None where it cannot be measured.
    """

    model: int
    phase: Phase
    batch_size: int
    context: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int
    flops: int | None
    ideal: float | None
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens read, or generated, in a second of the median round."""
        return self.batch_size * (self.context if self.phase == "prefill" else 1) / self.median

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes by which each token of a sequence makes the cache grow; exact where all layers attend to all tokens."""
        return self.cache_bytes / (self.batch_size * self.cache_tokens) if self.cache_bytes else 0.0

    @property
    def speed_up(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def share(self) -> float | None:
        """The speed-up over the ideal one."""
        return None if self.ideal is None else self.speed_up / self.ideal

    @property
    def rate(self) -> float | None:
        """Bytes that a step moves, or operations of the prefill, per second of the median round."""
        done = self.flops if self.phase == "prefill" else self.weight_bytes + self.cache_bytes
        return None if done is None else done / self.median

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, with the properties."""
        names = ("median", "tokens_per_second", "cache_bytes_per_token", "speed_up", "share", "rate")
        return asdict(self) | {name: getattr(self, name) for name in names}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the first and the third quartile."""
    first, _, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return first, third


@torch.inference_mode()
def measure_speed(
    models: Sequence[PreTrainedModel],
    batch_sizes: Sequence[int] = (1, 16),
    contexts: Sequence[int] = (512, 2048),
    new_tokens: int = 16,
    rounds: int = 5,
    warmup: int = 1,
    cache: CacheKind = "static",
    phases: Sequence[Phase] = ("prefill", "decode"),
    seed: int = 0,
    tell: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Measures prefill and decoding of models in interleaved rounds: each round measures every model once, in turning order.

    A disturbance of the machine thus hits all models alike. The speed-up is the median over rounds of the ratio to the reference
    in the same round. Prompts are random tokens; the first `warmup` rounds of each cell are not kept.

    The ideal speed-up is the ratio of the work that the reference and the model must do. Decoding is bound by memory: the bytes
    moved in a step are all weights once (except embedding tables that are only looked up) and the cache of all sequences. Prefill
    is bound by arithmetic: floating-point operations. All experts of a mixture count as read.

    Args:
        models: The first is the reference. They are not changed, and must be in eval mode.
        batch_sizes: Sequences at once.
        contexts: Tokens of each prompt.
        new_tokens: Tokens decoded after the prompt in each round.
        rounds: Rounds of each phase and cell.
        warmup: Rounds before these.
        cache: How the key/value cache is kept: see `Generation`.
        phases: Phases to measure. For "decode" alone, one prompt is read in each cell, and its keys and values stand for all
            sequences.
        seed: Seed of the prompts.
        tell: Called after each measurement.

    Returns:
        Rows by batch size, context, phase and model; none for "decode" if one of the models predicts no next token.

    Raises:
        ValueError: If an argument is not legal, before anything is run.

    Example:
        >>> import billhook as bh
        >>> from billhook.report.speed import measure_speed
        >>> rows = measure_speed([bh.load("tiny")], batch_sizes=[2], contexts=[8], new_tokens=2, rounds=1)
        >>> [(row.phase, row.cache_tokens, row.speed_up) for row in rows]
        [('prefill', 10, 1.0), ('decode', 10, 1.0)]
    """
    check_types(measure_speed, locals())
    check_speed(models, batch_sizes, contexts, new_tokens, rounds, warmup, cache, phases)
    rows = list[Timing]()
    for batch_size in batch_sizes:
        for context in contexts:
            runs = [Generation(model, _prompts(model, batch_size, context, seed), new_tokens, cache) for model in models]
            if "prefill" in phases:
                rows += _rows(runs, "prefill", _rounds(runs, rounds, warmup, Generation.start, Generation.prefill, tell))
            elif all(map(generates, models)):
                for generation in runs:
                    generation.fill()
            if "decode" in phases and all(map(generates, models)):
                rows += _rows(runs, "decode", _rounds(runs, rounds, warmup, Generation.rewind, Generation.decode, tell))
    return rows


def check_speed(
    models: Sequence[PreTrainedModel],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    rounds: int,
    warmup: int,
    cache: CacheKind,
    phases: Sequence[Phase],
) -> None:
    """Refuses arguments and models that cannot be measured."""
    for name, values in (("models", models), ("batch_sizes", batch_sizes), ("contexts", contexts), ("phases", phases)):
        if not values:
            raise ValueError(f"{name}: at least one is needed")
    for batch_size in batch_sizes:
        check_int("batch_sizes", batch_size)
    for context in contexts:
        check_int("contexts", context, 2)
    for name, number, least in (("new_tokens", new_tokens, 1), ("rounds", rounds, 1), ("warmup", warmup, 0)):
        check_int(name, number, least)
    check_one_of("cache", cache, CacheKind)
    for phase in phases:
        check_one_of("phases", phase, Phase)
    for number, model in enumerate(models):
        tokens = max(contexts) + (new_tokens if generates(model) else 0)
        _check_model(model, f"models: number {number}, a {type(model).__name__},", tokens)
    if list(phases) == ["decode"] and not all(map(generates, models)):
        raise ValueError("phases=['decode'] needs models that all predict next tokens")


def _check_model(model: PreTrainedModel, name: str, tokens: int) -> None:
    if model.main_input_name != "input_ids":
        raise ValueError(f"{name} reads {model.main_input_name}; one that reads input_ids is needed")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; a decoder alone or an encoder alone is needed")
    if generates(model) and cache_name(model) is None:
        raise ValueError(f"{name} takes none of transformers' caches, so that there is no incremental decoding to be measured")
    if model.training:
        raise ValueError(f"{name} is in training mode, with dropout: call model.eval() first")
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest and tokens > longest:
        raise ValueError(f"contexts and new_tokens are {tokens} tokens; {name} reads {longest} at once: ask for fewer")


def _prompts(model: PreTrainedModel, batch_size: int, context: int, seed: int) -> Tensor:
    """Draws random tokens, `[batch_size, context]`, the same for all models of one vocabulary."""
    vocabulary = text_config(model.config).vocab_size
    ids = torch.randint(vocabulary, (batch_size, context), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


def _rounds(
    runs: Sequence[Generation],
    rounds: int,
    warmup: int,
    before: Callable[[Generation], object],
    work: Callable[[Generation], object],
    tell: Callable[[], None],
) -> list[list[tuple[float, int | None]]]:
    """Measures, for each model and round, the seconds of the work and the most bytes that were taken."""
    measured: list[list[tuple[float, int | None]]] = [[] for _ in runs]
    for number in range(warmup + rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            run = runs[index]
            before(run)
            kept, device = _bytes(run.model.parameters()) + _bytes(run.tensors), run.model.device
            with Peak(device) as peak:
                _wait(device)
                began = time.perf_counter()
                work(run)
                _wait(device)
                seconds = time.perf_counter() - began
            measured[index].append((seconds, None if peak.rise is None else kept + peak.rise))
            tell()
    return [of_model[warmup:] for of_model in measured]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rows(runs: Sequence[Generation], phase: Phase, measured: Sequence[Sequence[tuple[float, int | None]]]) -> list[Timing]:
    steps = runs[0].new_tokens if phase == "decode" else 1
    rows = list[Timing]()
    for number, (run, rounds) in enumerate(zip(runs, measured, strict=True)):
        seconds = tuple(taken / steps for taken, _ in rounds)
        ratios = tuple(first / taken for first, taken in zip(rows[0].seconds if rows else seconds, seconds, strict=True))
        batch_size, context = run.ids.shape
        flops = _flops(run.model, context) if phase == "prefill" else None
        weights, cache = _read(run.model), _bytes(run.tensors)
        row = Timing(
            model=number, phase=phase, batch_size=batch_size, context=context, seconds=seconds, ratios=ratios,
            weight_bytes=weights, cache_bytes=cache, cache_tokens=run.cached_tokens, flops=flops and batch_size * flops,
            ideal=None, peak_bytes=max((taken for _, taken in rounds if taken is not None), default=None),
        )  # fmt: skip
        rows.append(replace(row, ideal=_ideal(rows[0] if rows else row, row)))
    return rows


def _ideal(first: Timing, row: Timing) -> float | None:
    if row.phase == "prefill":
        return first.flops / row.flops if first.flops and row.flops else None
    return (first.weight_bytes + first.cache_bytes) / (row.weight_bytes + row.cache_bytes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _read(model: PreTrainedModel) -> int:
    """Counts bytes of the weights that a step reads: all except tables in which a few rows are looked up."""
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    used = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return _bytes(p for p in model.parameters() if id(p) in used or id(p) not in looked_up)


def _flops(model: PreTrainedModel, context: int) -> int | None:
    """Counts operations of the prefill of one prompt on meta tensors; None where the model does not run there."""
    try:
        meta_model = meta_copy(model)
        with FlopCounterMode(display=False) as counter:
            Generation(meta_model, torch.zeros(1, context, dtype=torch.long, device="meta"), 0, "dynamic").prefill()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None
    return int(counter.get_total_flops())
