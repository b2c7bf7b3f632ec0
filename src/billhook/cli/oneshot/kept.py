"""The library that `shrink` keeps beside its output until that is saved, so that a search which was stopped goes on."""

import json
import shutil
from pathlib import Path

from billhook.cli.stopped import library_beside

MARK = "billhook-library.json"
"""The file by which it is known: a folder of its name without one is not touched."""


class KeptLibrary:
    """The folder of a library: one that was asked for, which stays, or one beside the output, which goes once that is saved.

    Args:
        out: The output.
        asked: The folder that was asked for, if one was.

    Raises:
        ValueError: If a folder beside the output has its name, and billhook did not write it.
    """

    def __init__(self, out: str, asked: str | None) -> None:
        self.folder, self._stays = library_beside(out) if asked is None else Path(asked), asked is not None
        if not self._stays and self.folder.exists() and not (self.folder / MARK).is_file():
            raise ValueError(
                f"'{self.folder}', in which shrink keeps what it has made, holds something that billhook did not write "
                f"({MARK} is not there): move it, or name a folder as library"
            )

    def begin(self) -> None:
        """Makes the folder beside the output."""
        if not self._stays:
            self.folder.mkdir(exist_ok=True)
            (self.folder / MARK).write_text(json.dumps({"until": "the output is saved"}))

    def done(self) -> None:
        """Removes the folder beside the output."""
        if not self._stays:
            shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self, variants: int) -> None:
        """Prints how many variants of an earlier run are taken."""
        if variants:
            print(f"{variants} variants are there from an earlier run, in {self.folder}, and are not made again", flush=True)
