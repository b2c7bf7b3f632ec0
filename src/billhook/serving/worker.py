"""Scripts in separate processes, so that a crash of an engine cannot end this process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import Self


class Missing(RuntimeError):
    """A package that is not installed. The message has the command that installs it."""


SCRIPTS = Path(__file__).parent / "workers"
RUN = "import runpy, sys; del sys.path[0], sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a script without its folder in the import path, as `python -P` does from Python 3.11."""
LINES = 12  # of a process's output, in the error after it ended


class WorkerError(RuntimeError):
    """A failed request. The message is the script's error, or the last lines of its output."""


class Worker:
    """A running script of the folder `workers`, with a line of JSON per request.

    C++ libraries abort their process on unexpected input, and two of them with their own threads disturb each other. In a
    separate process, either is at most a `WorkerError`. Use it in a `with` statement.

    Args:
        script: Name of the script.
        arguments: Command-line arguments of the script.
        environment: Environment variables, added to this process's.
    """

    def __init__(self, script: str, arguments: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in `close`
        safe_path = ["-P"] if sys.version_info >= (3, 11) else ["-c", RUN]
        self._process = subprocess.Popen(
            [sys.executable, *safe_path, str(SCRIPTS / f"{script}.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **(environment or {})},
            text=True,
            encoding="utf-8",
        )

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Sends a request and returns the script's answer.

        Raises:
            WorkerError: If the answer is an error, or the process has ended.
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
            self._output.seek(0)
            lines = [line.strip() for line in self._output.read().decode(errors="replace").splitlines()]
            last = " / ".join([line for line in lines if line][-LINES:]) or "no output"
            raise WorkerError(f"the process ended with status {self._process.wait()}: {last}")
        content: dict[str, Any] = json.loads(answer)
        if "error" in content:
            raise WorkerError(content["error"])
        return content

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        self._process.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
