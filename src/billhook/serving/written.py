"""Writes a folder as a GGUF file, by whichever way its shape asks for."""

from dataclasses import dataclass
from pathlib import Path

from billhook.model.meta import check_checkpoint
from billhook.model.preprocessors import FILES
from billhook.serving.converter import Converter, DType
from billhook.serving.worker import WorkerError


@dataclass(frozen=True)
class Written:
    """How a GGUF file was written.

    Attributes:
        by: What wrote it.
        vocabulary: Why it holds no vocabulary; empty if it holds one.
        split: The tokenizer as whose text is split, where llama.cpp's converter does not know the folder's own.
    """

    by: str
    vocabulary: str = ""
    split: str | None = None

    def __str__(self) -> str:
        return f"converted by {self.by}{f', its text split as {self.split} does' if self.split else ''}"


def write_gguf(folder: str, out: str | Path, converter: Converter, dtype: DType = "f32", ids_alone: bool = False) -> Written:
    """Writes a Hugging Face folder as a GGUF file.

    Args:
        folder: A checkpoint that transformers loads.
        out: The file.
        converter: llama.cpp's.
        dtype: Of its matrices.
        ids_alone: Whether a file without a vocabulary will do, where there is none in the folder or the converter does not read
            it: engines then read and write the numbers of tokens.

    Raises:
        WorkerError: If the converter fails; its message says why.
    """
    check_checkpoint(folder)
    by = "llama.cpp's converter"
    if not any((Path(folder) / name).is_file() for name in (*FILES, "tokenizer.model")):
        why = "the folder holds no tokenizer"
        if not ids_alone:
            raise WorkerError(why)
        converter.convert(folder, out, dtype, vocabulary=False)
        return Written(by, why)
    try:
        return Written(by, split=converter.convert(folder, out, dtype))
    except WorkerError as error:
        if not ids_alone:
            raise
        try:
            converter.convert(folder, out, dtype, vocabulary=False)
        except WorkerError:
            raise error from None
        return Written(by, f"{by} does not read the tokenizer ({error})")
