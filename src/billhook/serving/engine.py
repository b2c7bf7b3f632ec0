"""llama.cpp, run on a CPU by the package llama-cpp-py-sync, in a process of its own."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from billhook.serving.missing import Missing
from billhook.serving.worker import Worker

Kind = Literal["F16", "Q8_0", "Q4_K_M"]
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
