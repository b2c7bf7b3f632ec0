"""Where the files of a checkpoint are: in a folder, or on a hub, from which they are fetched one at a time, or their headers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers.utils.hub import cached_file


class Source:
    """A folder, or a repository of a hub as it was at the commit from which its config has come.

    Args:
        name: A folder or a hub name.

    Attributes:
        commit: The commit; None of a folder.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name) if Path(name).is_dir() else None
        config = None if self.folder else try_to_load_from_cache(name, "config.json")
        self.commit = Path(config).parent.name if isinstance(config, str) else None

    def here(self, file: str) -> Path | None:
        """Returns where a file lies on this machine; None if it does not."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        found = try_to_load_from_cache(self.name, file, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: str) -> Path:
        """Returns where a file lies, once it is here as a whole."""
        return Path(cast(str, cached_file(self.name, file, revision=self.commit)))

    def has(self, file: str) -> bool:
        """Asks the hub whether there is such a file; of a folder, and where no hub is asked, that is known."""
        if self.folder is not None or constants.HF_HUB_OFFLINE:
            return self.here(file) is not None
        with self._asked(file):
            return HfApi().file_exists(self.name, file, revision=self.commit)

    def header(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """Asks the hub for the dtype and the shape of each tensor in a file, by its first bytes."""
        with self._asked(file):
            found = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.commit).tensors
        return {name: (one.dtype, one.shape) for name, one in found.items()}

    @contextmanager
    def _asked(self, file: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client and what it is made of raise all kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the hub does not say what {file} holds: {first}") from error
