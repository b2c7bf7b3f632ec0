"""Writes a folder as a GGUF file, by whichever way its shape asks for."""

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

from billhook.arguments import check_one_of, check_path
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.preprocessors import FILES
from billhook.model.shaped import has_shape_entry, load_as, readable
from billhook.serving.converter import Converter, DType
from billhook.serving.engine import Kind, LlamaCpp
from billhook.serving.engines import misread
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
    if has_shape_entry(folder) or misread(read_config(folder)):
        by = "billhook, as llama.cpp's deci, which takes heads and widths of each layer"
        convert = partial(_write_shaped, folder, out, converter, dtype)
    else:
        by = "llama.cpp's converter"
        convert = partial(converter.convert, folder, out, dtype)
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
        small, twin = Path(near, Path(folder).resolve().name), Path(near, "twin.gguf")
        save_twin(model, Path(folder), small)
        split = converter.convert(small, twin, "f32", vocabulary)
        write_deci(model, twin, Path(out), dtype)
    return split


GGUFKind = Literal["auto", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]
"""How weights are kept; `"auto"` is the dtype of the folder's own."""
DTYPES: dict[str, DType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MAGIC = b"GGUF"


def export_gguf(folder: str | Path, out: str | Path, kind: GGUFKind = "auto", converter: str | Path | None = None) -> Written:
    """Writes a Hugging Face folder as a GGUF file; at every moment `out` is missing, or complete.

    Plain checkpoints go through llama.cpp's converter; where layers differ, billhook writes llama.cpp's architecture `deci`,
    which takes heads, KV heads and widths of each layer, for families that compute what a Llama does.

    Args:
        folder: A Hugging Face checkpoint, with a tokenizer.
        out: The file, ending in .gguf; new, or a GGUF file to replace.
        kind: Number format of the weights: `"F32"`, `"F16"`, `"BF16"`, or quantized by llama.cpp: `"Q8_0"`, `"Q6_K"`, `"Q5_K_M"`,
            or `"Q4_K_M"`. `"auto"` keeps the dtype of the folder's weights.
        converter: Where llama.cpp's `convert_hf_to_gguf.py` is; by default the one that is installed.

    Raises:
        ValueError: If an argument is not legal, or the folder cannot be converted.
        Missing: If the converter is not installed, or the engine, which quantises; its message says what to install.
    """
    check_gguf(out, kind)
    path, quantised = Path(out), kind in get_args(Kind)
    draft = path.with_name(f".{path.name}.draft")
    exact = draft.with_name(f"{draft.name}-whole") if quantised else draft
    dtype = _dtype_of(folder) if kind == "auto" or quantised else cast(DType, kind.lower())
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with Converter(converter) as running:
            written = write_gguf(str(folder), exact, running, dtype)
        if quantised:
            with LlamaCpp() as engine:
                engine.quantise(exact, draft, cast(Kind, kind))
        draft.replace(path)
    except WorkerError as error:
        raise ValueError(f"gguf: '{folder}' cannot be converted: {error}") from error
    finally:
        for file in {draft, exact}:
            file.unlink(missing_ok=True)
    return written


def check_gguf(out: str | Path, kind: GGUFKind = "auto") -> None:
    """Refuses a file that is not to be written, and an unknown kind."""
    check_one_of("kind", kind, GGUFKind)
    check_path("gguf", out, [".gguf"])
    path = Path(out)
    other = path.is_dir()
    if path.is_file():
        with path.open("rb") as file:
            other = file.read(len(MAGIC)) != MAGIC
    if other:
        raise ValueError(f"gguf='{out}' is there, and no GGUF file, which would be replaced")


def _dtype_of(folder: str | Path) -> DType:
    """Returns the dtype that a folder's config names; float32 if it names none, or another."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "f32"  # refused where it is read
    return DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "", "f32")
