"""llama.cpp, run on a CPU by the package llama-cpp-py-sync, in a process of its own."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from billhook.serving.worker import Missing, Worker

Kind = Literal["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]
PACKAGE = "llama_cpp_py_sync"


class LlamaCpp:
    """llama.cpp with a GGUF file at a time in its memory; use it in a `with` statement.

    Another engine is a class with the same methods.

    Args:
        threads: Threads that compute.

    Raises:
        Missing: If the package is not installed.
    """

    name = "llama.cpp"

    def __init__(self, threads: int = 1) -> None:
        if find_spec(PACKAGE) is None:
            raise Missing("llama.cpp is not installed: pip install 'billhook[serve]'")
        self.threads = threads
        self._folder = tempfile.TemporaryDirectory()
        self._worker = Worker("run_llama_cpp")

    def load(self, file: str | Path, context: int = 512, cache: Literal["F32", "F16"] = "F32") -> int:
        """Loads a file in place of the one before, for rows of up to `context` tokens; returns how many the vocabulary has.

        Raises:
            WorkerError: If llama.cpp does not load it; its message says why.
        """
        answer = self._worker.ask(do="load", file=str(file), context=context, threads=self.threads, cache=cache)
        return int(answer["vocabulary"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each token of a row: [tokens, vocabulary], float32."""
        out = Path(self._folder.name, "logits.npy")
        self._worker.ask(do="logits", tokens=list(tokens), out=str(out))
        return torch.from_numpy(np.load(out))

    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], float, float]:
        """Returns the `count` tokens that follow by always taking the most likely one, and the seconds that it took.

        The first are those of reading `tokens`, which gives the first token, the others those of the rest.
        """
        answer = self._worker.ask(do="greedy", tokens=list(tokens), count=count)
        return answer["tokens"], float(answer["read"]), float(answer["written"])

    def tokenize(self, text: str) -> list[int] | None:
        """Returns the tokens of a text, without any put around it; None if the file holds no vocabulary."""
        tokens: list[int] | None = self._worker.ask(do="tokenize", text=text)["tokens"]
        return tokens

    def quantise(self, file: str | Path, out: str | Path, kind: Kind) -> int:
        """Writes a file of F32 or F16 with weights of another kind; returns its size in bytes."""
        answer = self._worker.ask(do="quantise", file=str(file), out=str(out), kind=kind, threads=self.threads)
        return int(answer["bytes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
        self._folder.cleanup()


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


def speed_up(first: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Returns quartile, median and quartile of the ratio of seconds in the same rounds, of two rounds at least."""
    low, middle, high = quantiles([a / b for a, b in zip(first, other, strict=True)], n=4, method="inclusive")
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
    read: list[list[float]] = [[] for _ in files]
    written: list[list[float]] = [[] for _ in files]
    with ExitStack() as stack:
        engines = [stack.enter_context(LlamaCpp(threads)) for _ in files]
        sizes = [engine.load(file, context + new_tokens, "F16") for engine, file in zip(engines, files, strict=True)]
        prompt = [1 + number * 7919 % (min(sizes) - 1) for number in range(context)]
        for turn in range(warmup + rounds):
            for first in range(len(files)):
                number = (first + turn) % len(files)
                _, reading, writing = engines[number].greedy(prompt, new_tokens)
                if turn >= warmup:
                    read[number].append(reading)
                    written[number].append(writing)
                tell()
    return [EngineSpeed(context, new_tokens - 1, tuple(r), tuple(w)) for r, w in zip(read, written, strict=True)]
