"""The printed text of each command, as a snapshot."""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "cli" / "printed"
VARIES = (  # with the machine and its rounding
    (r"/\S*?pytest-of-\w+/pytest-\d+/(popen-gw\d+/)?[\w.-]+?(?=[/\s'\"():,;]|$)", "TMP"),
    (r"\(\d[\d.,]*-\d[\d.,]*\)", "(0-0)"),
    (r"(?<![\w.-])[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "0"),
    (r"cpu \(\w+\)", "cpu"),
    (r"\b0 (ms|s|min|h)\b", "0 s"),
    (r"\b0 ([kMGT]?B|bytes)\b", "0 B"),
    (r"-{4,}", "----"),
    (r"[ \t]+(?=\n|$)", ""),
    (r"(?<=\S) {2,}", "  "),
    (r"(?m)^(.*\n)\1+", r"\1"),  # rows of figures alone
)


def assert_printed(name: str, text: str) -> None:
    """Compares printed text with its snapshot, without figures; `BILLHOOK_PRINTED=write` stores it."""
    for pattern, replacement in VARIES:
        text = re.sub(pattern, replacement, text)
    file = FOLDER / f"{name}.txt"
    if os.environ.get("BILLHOOK_PRINTED") == "write":
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
