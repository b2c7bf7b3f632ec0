"""What a saved folder says to everybody once it is pushed: nothing of where it was made."""

import json
import tempfile
from pathlib import Path

import billhook as bh

PRIVATE = (f"{tempfile.gettempdir()}/", f"{Path.home()}/", str(Path(bh.__file__).parent))
"""The folders of tests, the user's own, and that of the models in the package."""


def record_of(folder):
    """Returns the record beside a checkpoint, when all files of text there have been looked through for private paths."""
    for path in Path(folder).rglob("*"):
        if path.suffix in (".json", ".md", ".txt", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert not [private for private in PRIVATE if private in text], f"{path.name} names a private folder"
    return json.loads((Path(folder) / "billhook.json").read_text())
