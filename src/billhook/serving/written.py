"""Writes a folder as a GGUF file, by whichever way its shape asks for."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.preprocessors import FILES
from billhook.model.shapes.shaped import load_as, readable, says_shape
from billhook.serving.converter import Converter, DType
from billhook.serving.verdicts import misread
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
    if says_shape(folder) or misread(read_config(folder)):
        by = "billhook, as llama.cpp's deci, which takes heads and widths of each layer"
        convert = partial(_write_shaped, folder, out, converter, dtype)
    else:
        by = "llama.cpp's converter"
        convert = partial(converter.convert, folder, out, dtype)
    return _with_or_without(by, folder, convert, ids_alone)


def _with_or_without(by: str, folder: str, convert: Callable[[bool], str | None], ids_alone: bool) -> Written:
    """Converts with the vocabulary, or without where there is none that the converter reads."""
    if not any((Path(folder) / name).is_file() for name in (*FILES, "tokenizer.model")):
        why = "the folder holds no tokenizer"
        if not ids_alone:
            raise WorkerError(why)
        convert(False)
        return Written(by, why)
    try:
        return Written(by, split=convert(True))
    except WorkerError as error:
        if not ids_alone:
            raise
        try:
            convert(False)
        except WorkerError:
            raise error from None
        return Written(by, f"llama.cpp's converter does not read the tokenizer ({error})")


def _write_shaped(folder: str, out: str | Path, converter: Converter, dtype: DType, vocabulary: bool) -> str | None:
    """Writes a folder whose shape is billhook's; returns how its text is split, as `Converter.convert` does."""
    from billhook.serving.deci import save_twin, why_not, write_deci  # it needs gguf, an extra

    with readable(folder):
        model = load_as(model_class(read_config(folder), folder), folder, "auto")
    if (why := why_not(model)) is not None:
        raise WorkerError(why)
    with tempfile.TemporaryDirectory() as near:
        place, twin = Path(near, Path(folder).resolve().name), Path(near, "twin.gguf")
        save_twin(model, Path(folder), place)
        split = converter.convert(place, twin, "f32", vocabulary)
        write_deci(model, twin, Path(out), dtype)
    return split
