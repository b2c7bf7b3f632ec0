"""A script in a process of its own, which answers requests: whatever becomes of an engine, this process goes on."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self


class Missing(RuntimeError):
    """A package that is not installed, or a program that is not found; its message says how to get it."""


SCRIPTS = Path(__file__).parent / "workers"
LINES = 12  # of what a process said before it ended


class WorkerError(RuntimeError):
    """A request that failed; its message is the script's, or the last lines that its process wrote."""


class Worker:
    """A script of the folder `workers`, running: it reads a line of JSON for each request, and writes one in return.

    Libraries of C++ end their process where they meet what they did not expect, and two of them that bring threads of their own
    disturb each other; in a process of its own, either is a `WorkerError` at most. Use it in a `with` statement.

    Args:
        script: The name of the script.
        arguments: Its command line.
        environment: Variables of its environment, beside this process's.
    """

    def __init__(self, script: str, arguments: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        self._says = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPTS / f"{script}.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._says,
            env={**os.environ, **(environment or {})},
            text=True,
            encoding="utf-8",
        )

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Returns what the script answers.

        Raises:
            WorkerError: If it answers with an error, or its process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerError(f"its process ended with {self._process.wait()}: {self._last_lines()}")
        answered: dict[str, Any] = json.loads(answer)
        if "error" in answered:
            raise WorkerError(answered["error"])
        return answered

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._process.wait()
        self._says.close()

    def _last_lines(self) -> str:
        self._says.seek(0)
        lines = self._says.read().decode(errors="replace").splitlines()
        return " / ".join([line.strip() for line in lines if line.strip()][-LINES:]) or "it said nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
