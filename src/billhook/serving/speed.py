"""Measures how fast llama.cpp reads prompts and writes tokens, of several files in interleaved rounds."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from billhook.serving.engine import LlamaCpp


@dataclass(frozen=True)
class EngineSpeed:
    """The seconds of each round of a file.

    Attributes:
        context: Tokens of the prompt.
        new_tokens: Tokens that were written after the first, which comes of the prompt.
        read: Seconds in which the prompt was read.
        written: Seconds in which the others were written.
    """

    context: int
    new_tokens: int
    read: tuple[float, ...]
    written: tuple[float, ...]

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt a second, the median over rounds."""
        return self.context / median(self.read)

    @property
    def writing_rate(self) -> float:
        """Tokens written a second, the median over rounds."""
        return self.new_tokens / median(self.written)


def speed_up(first: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Returns quartile, median and quartile of the ratio of seconds in the same rounds, of two rounds at least."""
    low, middle, high = quantiles([a / b for a, b in zip(first, own, strict=True)], n=4, method="inclusive")
    return low, middle, high


def measure_engine(
    files: Sequence[Path],
    context: int,
    new_tokens: int,
    rounds: int,
    warmup: int = 1,
    threads: int = 1,
    tell: Callable[[], object] = lambda: None,
) -> list[EngineSpeed]:
    """Measures each file in every round, in turning order, so that a disturbance of the machine hits all of them.

    All files are in memory at once, each in a process of its own, with keys and values in F16.

    Args:
        files: GGUF files.
        context: Tokens of the prompt.
        new_tokens: Tokens that are written after it; two at least.
        rounds: Rounds that count.
        warmup: Rounds before these.
        threads: Threads of each.
        tell: Called after each measurement.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in files]
    with ExitStack() as stack:
        engines = [stack.enter_context(LlamaCpp(threads)) for _ in files]
        sizes = [engine.load(file, context + new_tokens, "F16") for engine, file in zip(engines, files, strict=True)]
        prompt = [1 + number * 7919 % (min(sizes) - 1) for number in range(context)]
        for turn in range(warmup + rounds):
            for place in range(len(files)):
                number = (place + turn) % len(files)
                _, read, written = engines[number].greedy(prompt, new_tokens)
                if turn >= warmup:
                    found[number].append((read, written))
                tell()
    return [EngineSpeed(context, new_tokens - 1, tuple(r for r, _ in own), tuple(w for _, w in own)) for own in found]
