"""Prefill and decoding speed of models in interleaved rounds, and the ideal speedup."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import truediv
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.arguments import check_int, check_one_of, check_types
from billhook.engine import resident
from billhook.model import meta_copy, text_config
from billhook.report.generation import CacheKind, Generation, cache_name, generates

RESET = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Context manager that measures the peak memory of a device.

    Afterward, `rise` is the number of bytes by which the peak exceeded the memory in use before, or None if it is not measured.
    On CUDA, this is torch's allocated memory. On a CPU, it is the resident memory of the process (Linux only), which misses
    memory that the process had freed, kept, and used again.
    """

    device: torch.device
    rise: int | None = None
    _before: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            with suppress(OSError):
                RESET.write_text("5")  # resets the kernel's peak memory of this process
                self._before = resident()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            most = torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM") or 0
            self.rise = max(most - self._before, 0)


Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Timing:
    """Time and memory of a model in a phase, at a batch size and context.

    Attributes:
        model: Index of the model; 0 is the reference.
        phase: "prefill": all prompts in one forward pass. "decode": one step, a token for each sequence.
        batch_size: Number of sequences.
        context: Tokens per prompt.
        seconds: Seconds of each round: for the prefill, or for a decoding step (the mean over the round's steps).
        ratios: Speedup of each round: the reference's seconds divided by the model's.
        weight_bytes: Bytes of the weights that a step reads.
        cache_bytes: Bytes of the KV cache; 0 without a cache.
        cache_tokens: Tokens per sequence for which the cache has memory.
        flops: Floating-point operations of the prefill, with full (not causal) attention; None if the model does not run on meta
            tensors.
        ideal: Ideal speedup over the reference; None if unknown.
        peak_bytes: Peak memory: weights, cache, and activations; None if it is not measured.
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
        """Median of `seconds`."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens processed or generated per second, in the median round."""
        return self.batch_size * (self.context if self.phase == "prefill" else 1) / self.median

    @property
    def cache_bytes_per_token(self) -> float:
        """KV-cache bytes per token; exact if all layers attend to all tokens."""
        return self.cache_bytes / (self.batch_size * self.cache_tokens) if self.cache_bytes else 0.0

    @property
    def speed_up(self) -> float:
        """Median of `ratios`."""
        return median(self.ratios)

    @property
    def share(self) -> float | None:
        """Speedup divided by the ideal speedup."""
        return None if self.ideal is None else self.speed_up / self.ideal

    @property
    def work(self) -> int | None:
        """Operations of the prefill, or bytes read by a step."""
        return self.flops if self.phase == "prefill" else self.weight_bytes + self.cache_bytes

    @property
    def rate(self) -> float | None:
        """Bytes read by a step, or operations of the prefill, per second in the median round."""
        return None if self.work is None else self.work / self.median

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-compatible data, including the properties."""
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
    progress: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Measures prefill and decoding speed in interleaved rounds.

    Each round measures every model once, in alternating order, so that disturbances of the machine affect all models. The speedup
    is the median over rounds of the ratio to the reference in the same round. Prompts are random tokens.

    The ideal speedup is the ratio of the work of the reference and the model. Decoding is bound by memory: a step reads all
    weights (except embedding tables, which are only looked up) and the cache of all sequences. Prefill is bound by floating-point
    operations. All experts of a mixture count as read.

    Args:
        models: Models in evaluation mode; the first is the reference.
        batch_sizes: Numbers of sequences.
        contexts: Numbers of tokens per prompt.
        new_tokens: Number of tokens to decode after the prompt in each round.
        rounds: Number of rounds for each phase, batch size, and context.
        warmup: Number of rounds to run and discard before.
        cache: Kind of the KV cache: see `Generation`.
        phases: Phases to measure. With "decode" only, one prompt is processed and its keys and values fill the cache of all
            sequences.
        seed: Seed of the prompts.
        progress: Called after each measurement.

    Returns:
        Timings by batch size, context, phase, and model; none for "decode" if a model does not predict next tokens.

    Raises:
        ValueError: If an argument is not legal.

    Example:
        >>> import billhook as bh
        >>> from billhook.report.speed import measure_speed
        >>> rows = measure_speed([bh.load("tiny")], batch_sizes=[2], contexts=[8], new_tokens=2, rounds=1)
        >>> [(row.phase, row.cache_tokens, row.speed_up) for row in rows]
        [('prefill', 10, 1.0), ('decode', 10, 1.0)]
    """
    check_types(measure_speed, locals())
    check_speed(models, batch_sizes, contexts, new_tokens, rounds, warmup, phases)
    rows = []
    for batch_size in batch_sizes:
        for context in contexts:
            runs = []
            for model in models:  # models with the same number of tokens get the same prompts
                generator = torch.Generator().manual_seed(seed)
                tokens = text_config(model.config).vocab_size
                ids = torch.randint(tokens, (batch_size, context), generator=generator)
                runs.append(Generation(model, ids.to(model.device), new_tokens, cache))
            if "prefill" in phases:
                rows += _rows(runs, "prefill", _rounds(runs, rounds, warmup, Generation.start, Generation.prefill, progress))
            elif all(map(generates, models)):
                for generation in runs:
                    generation.fill()
            if "decode" in phases and all(map(generates, models)):
                rows += _rows(runs, "decode", _rounds(runs, rounds, warmup, Generation.rewind, Generation.decode, progress))
    return rows


def check_speed(
    models: Sequence[PreTrainedModel],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    rounds: int,
    warmup: int,
    phases: Sequence[Phase],
) -> None:
    """Raises `ValueError` if arguments or models cannot be measured.

    Args:
        models: The models.
        batch_sizes: Numbers of sequences.
        contexts: Numbers of tokens of the prompt.
        new_tokens: Number of tokens to generate.
        rounds: Number of repetitions.
        warmup: Number of repetitions that do not count.
        phases: What to measure.
    """
    for argument, values in (("models", models), ("batch_sizes", batch_sizes), ("contexts", contexts), ("phases", phases)):
        if not values:
            raise ValueError(f"{argument}=[] must have at least one entry.")
    for batch_size in batch_sizes:
        check_int("batch_sizes", batch_size)
    for context in contexts:
        check_int("contexts", context, 2)
    check_int("new_tokens", new_tokens)
    check_int("rounds", rounds)
    check_int("warmup", warmup, 0)
    for phase in phases:
        check_one_of("phases", phase, Phase)
    for number, model in enumerate(models):
        name = f"models: {type(model).__name__} (number {number})"
        tokens = max(contexts) + new_tokens * generates(model)
        if model.main_input_name != "input_ids":
            raise ValueError(f"{name} takes {model.main_input_name}. Only models that take input_ids are supported.")
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder. Only decoders and encoders are supported.")
        if generates(model) and cache_name(model) is None:
            raise ValueError(f"{name} does not support transformers' caches, so its decoding cannot be measured.")
        if model.training:
            raise ValueError(f"{name} is in training mode. Call model.eval() first.")
        longest = getattr(text_config(model.config), "max_position_embeddings", None)
        if longest and tokens > longest:
            raise ValueError(f"contexts and new_tokens add up to {tokens} tokens; {name} supports {longest}. Use fewer.")
    if list(phases) == ["decode"] and not all(map(generates, models)):
        raise ValueError("phases=['decode'] requires models that predict next tokens.")


Rounds = list[tuple[float, int | None]]
"""Seconds and peak bytes of each round."""


def _rounds(
    runs: Sequence[Generation],
    rounds: int,
    warmup: int,
    before: Callable[[Generation], object],
    work: Callable[[Generation], object],
    progress: Callable[[], object],
) -> list[Rounds]:
    """Returns seconds and peak bytes of `work` for each model and round."""
    measured: list[Rounds] = [[] for _ in runs]
    for number in range(warmup + rounds):
        for index in range(len(runs)) if number % 2 == 0 else reversed(range(len(runs))):
            run = runs[index]
            before(run)
            allocated = _bytes(run.model.parameters()) + _bytes(run.tensors)
            device = run.model.device
            with Peak(device) as peak:
                _wait(device)
                began = time.perf_counter()
                work(run)
                _wait(device)
                seconds = time.perf_counter() - began
            measured[index].append((seconds, None if peak.rise is None else allocated + peak.rise))
            progress()
    return [of_model[warmup:] for of_model in measured]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rows(runs: Sequence[Generation], phase: Phase, measured: Sequence[Rounds]) -> list[Timing]:
    steps = runs[0].new_tokens if phase == "decode" else 1
    rows = list[Timing]()
    for number, (run, rounds) in enumerate(zip(runs, measured, strict=True)):
        seconds = tuple(elapsed / steps for elapsed, _ in rounds)
        ratios = tuple(map(truediv, rows[0].seconds if rows else seconds, seconds))
        peaks = [peak for _, peak in rounds if peak is not None]
        batch_size, context = run.ids.shape
        flops = _flops(run.model, context) if phase == "prefill" else None
        looked_up = set[nn.Parameter]()
        used = set[nn.Parameter]()
        for module in run.model.modules():
            (looked_up if isinstance(module, nn.Embedding) else used).update(module.parameters(recurse=False))
        # a step reads all weights but embedding tables, of which it looks up rows
        weights = _bytes(parameter for parameter in run.model.parameters() if parameter in used or parameter not in looked_up)
        cache = _bytes(run.tensors)
        row = Timing(
            model=number, phase=phase, batch_size=batch_size, context=context, seconds=seconds, ratios=ratios,
            weight_bytes=weights, cache_bytes=cache, cache_tokens=run.cached_tokens, flops=flops and batch_size * flops,
            ideal=None, peak_bytes=max(peaks, default=None),
        )  # fmt: skip
        first = rows[0] if rows else row
        rows.append(replace(row, ideal=first.work / row.work if first.work and row.work else None))
    return rows


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops(model: PreTrainedModel, context: int) -> int | None:
    """Counts operations of a prompt's prefill on meta tensors; None if it does not run."""
    try:
        meta_model = meta_copy(model)
        with FlopCounterMode(display=False) as counter:
            Generation(meta_model, torch.zeros(1, context, dtype=torch.long, device="meta"), 0, "dynamic").prefill()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None
    return int(counter.get_total_flops())
