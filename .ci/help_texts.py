"""Stores the help of each command, which `billhook COMMAND --help` prints without importing torch.

python .ci/help_texts.py [FOLDER]
"""

import contextlib
import io
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"

from billhook.cli.main import _run  # noqa: E402
from billhook.cli.options import COMMANDS  # noqa: E402

FOLDER = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1] / "src/billhook/cli/help"

for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        _run(command, ["--help"])
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{command}.txt").write_text(text.getvalue())
