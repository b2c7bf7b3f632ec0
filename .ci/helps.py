"""Asks each command for its help, in one process, without the modules that are named.

python .ci/helps.py gguf onnx
"""

import contextlib
import io
import sys

sys.modules.update(dict.fromkeys(sys.argv[1:]))  # as if they were not installed

from billhook.cli.main import _run, main  # noqa: E402
from billhook.cli.options import COMMANDS, LIGHTNING  # noqa: E402

for command in (*LIGHTNING, *COMMANDS):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        _run(command, ["--help"]) if command in COMMANDS else main([command, "--help"])  # not the stored text
    assert "usage: " in text.getvalue(), command
    print(command)
