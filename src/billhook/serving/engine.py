"""llama.cpp on a CPU, run by the package llama-cpp-py-sync in a separate process."""

import tempfile
from collections import defaultdict
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
    """llama.cpp with one GGUF file loaded at a time. Use it in a `with` statement.

    Another engine is a class with the same methods.

    Args:
        threads: Number of threads.

    Raises:
        Missing: If the package is not installed.
    """

    name = "llama.cpp"

    def __init__(self, threads: int = 1) -> None:
        if find_spec(PACKAGE) is None:
            raise Missing("llama.cpp is not installed. Run: pip install 'billhook[serve]'")
        self.threads = threads
        self._folder = tempfile.TemporaryDirectory()
        self._worker = Worker("run_llama_cpp")

    def load(self, file: str | Path, context: int = 512, cache: Literal["F32", "F16"] = "F32") -> int:
        """Loads a file for up to `context` tokens; returns the vocabulary size.

        Raises:
            WorkerError: If llama.cpp cannot load it. The message has the reason.
        """
        answer = self._worker.ask(do="load", file=str(file), context=context, threads=self.threads, cache=cache)
        return int(answer["vocabulary"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each token: `[tokens, vocabulary]`, float32."""
        out = Path(self._folder.name, "logits.npy")
        self._worker.ask(do="logits", tokens=list(tokens), out=str(out))
        return torch.from_numpy(np.load(out))

    def greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], float, float]:
        """Returns `count` greedy tokens, the seconds of prefill, and the seconds of decoding.

        Prefill gives the first token, and decoding the others.
        """
        answer = self._worker.ask(do="greedy", tokens=list(tokens), count=count)
        return answer["tokens"], float(answer["prefill"]), float(answer["decoding"])

    def tokenize(self, text: str) -> list[int] | None:
        """Returns the tokens of a text without special tokens; None without a vocabulary."""
        tokens: list[int] | None = self._worker.ask(do="tokenize", text=text)["tokens"]
        return tokens

    def quantize(self, file: str | Path, out: str | Path, kind: Kind) -> None:
        """Quantizes an F32 or F16 file."""
        self._worker.ask(do="quantize", file=str(file), out=str(out), kind=kind, threads=self.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
        self._folder.cleanup()


@dataclass(frozen=True)
class EngineSpeed:
    """Prefill and decoding times of a file, in seconds per round.

    Attributes:
        context: Number of prompt tokens.
        new_tokens: Number of decoded tokens, without the first, which prefill gives.
        prefill: Seconds of prefill in each round.
        decoding: Seconds of decoding in each round.
    """

    context: int
    new_tokens: int
    prefill: tuple[float, ...]
    decoding: tuple[float, ...]

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, median over rounds."""
        return self.context / median(self.prefill)

    @property
    def decoding_rate(self) -> float:
        """Decoded tokens per second, median over rounds."""
        return self.new_tokens / median(self.decoding)


def speed_up(first: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Returns quartile, median, and quartile of the ratios of seconds in the same rounds."""
    low, middle, high = quantiles([a / b for a, b in zip(first, other, strict=True)], n=4, method="inclusive")
    return low, middle, high


def measure_engine(
    files: Sequence[Path],
    context: int,
    new_tokens: int,
    rounds: int,
    warmup: int = 1,
    threads: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> list[EngineSpeed]:
    """Measures prefill and decoding of files in interleaved rounds, with a rotating order.

    Any disturbance of the machine therefore affects all files. All files are in memory at once, each in its own process, with
    keys and values in F16.

    Args:
        files: GGUF files.
        context: Number of prompt tokens.
        new_tokens: Number of tokens to generate, at least 2.
        rounds: Number of measured rounds.
        warmup: Number of rounds before the first measured one.
        threads: Number of threads per file.
        progress: Called after each measurement.
    """
    prefill = defaultdict(list)  # by file number
    decoding = defaultdict(list)
    engines = []
    sizes = []
    with ExitStack() as stack:
        for file in files:
            engines.append(stack.enter_context(LlamaCpp(threads)))
            sizes.append(engines[-1].load(file, context + new_tokens, "F16"))
        prompt = [1 + number * 7919 % (min(sizes) - 1) for number in range(context)]
        for round_number in range(warmup + rounds):
            for first in range(len(files)):
                number = (first + round_number) % len(files)
                _, prefill_seconds, decoding_seconds = engines[number].greedy(prompt, new_tokens)
                if round_number >= warmup:
                    prefill[number].append(prefill_seconds)
                    decoding[number].append(decoding_seconds)
                progress()
    return [EngineSpeed(context, new_tokens - 1, tuple(prefill[number]), tuple(decoding[number])) for number in range(len(files))]
