"""Writes checkpoints as GGUF files."""

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from transformers import PretrainedConfig

from billhook.arguments import check_one_of, check_path
from billhook.model import FILES, check_checkpoint, has_shape_entry, load_as, model_class, read_config, readable, text_config
from billhook.serving.converter import Converter, DType
from billhook.serving.engine import Kind, LlamaCpp
from billhook.serving.worker import WorkerError

LONGROPE = ("Phi3ForCausalLM", "MiniCPM3ForCausalLM")
"""Classes whose longrope factors the converter writes."""
FREQUENCY_FACTORS = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")
"""Classes for which llama.cpp reads the tensor `rope_freqs.weight`."""
DECI: dict[str, tuple[tuple[object, ...], str]] = {
    "model_type": (("llama", "mistral", "qwen2", "seed_oss", "phi3"), "llama.cpp's architecture deci does not compute {}"),
    "hidden_act": (("silu", "swish"), "llama.cpp's architecture for it computes silu, not {}"),
    "rope_type": (
        ("default", "linear", "llama3", "yarn"),
        "its rotary positions ({}) are not default, linear, llama3, yarn, or longrope with equal factors",
    ),
    "partial_rotary_factor": ((1,), "its rotary positions cover {} of heads instead of full heads"),
}
"""Config values that `deci` computes, and the limitation for others."""


def misread(kind: str, config: PretrainedConfig) -> str:
    """Returns the reason why llama.cpp's converter misreads a model, or an empty string.

    The architecture `deci` may compute such a model (see `deci_limitation`).
    """
    width = getattr(config, "head_dim", None)
    if config.model_type == "phi3" and width and width * config.num_attention_heads != config.hidden_size:
        return "its converter assumes a head dimension of hidden size / heads"
    if _rope(config).get("rope_type") != "longrope" or kind in LONGROPE:
        return ""
    return "" if kind in FREQUENCY_FACTORS and rope_factors(config) else "its converter drops longrope factors"


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """Returns longrope's divisors of rotary frequencies if they hold at all lengths.

    None if the config has another type, other factors for long texts, or scaled attention.
    """
    rope = _rope(config)
    equal = rope.get("rope_type") == "longrope" and rope.get("short_factor") == rope.get("long_factor")
    return rope.get("short_factor") if equal and rope.get("attention_factor") == 1 else None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the rotary parameters of a config, empty if it has none."""
    rope = getattr(text_config(config), "rope_parameters", None)
    return rope if isinstance(rope, dict) else {}


def deci_limitation(config: PretrainedConfig) -> str | None:
    """Returns the reason why llama.cpp's `deci` cannot compute a model, or None.

    Its layers may differ, and it computes the same as a Llama, and so as every family that differs only in storage order.
    """
    rope = _rope(config)
    needs = {"model_type": config.model_type, "hidden_act": getattr(config, "hidden_act", None)}
    needs["rope_type"] = "default" if rope_factors(config) else rope.get("rope_type", "default")
    needs["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1)
    return next((DECI[field][1].format(value) for field, value in needs.items() if value not in DECI[field][0]), None)


@dataclass(frozen=True)
class Written:
    """How a GGUF file was written.

    Attributes:
        by: Name of the converter.
        vocabulary: Reason why it has no vocabulary. Empty if it has one.
        split: Tokenizer whose text splitting is used if llama.cpp's converter does not know the folder's tokenizer.
    """

    by: str
    vocabulary: str = ""
    split: str | None = None

    def __str__(self) -> str:
        return f"converted by {self.by}{f', text split as in {self.split}' if self.split else ''}"


def write_gguf(folder: str, out: str | Path, converter: Converter, dtype: DType = "f32", ids_only: bool = False) -> Written:
    """Writes a Hugging Face folder as a GGUF file.

    Args:
        folder: Hugging Face checkpoint.
        out: Output file.
        converter: llama.cpp's converter.
        dtype: Data type of matrices.
        ids_only: If True, writes a file without a vocabulary if the folder has no tokenizer, or one that the converter cannot
            read. Engines then work with token ids.

    Raises:
        WorkerError: If the converter fails. The message has the reason.
    """
    check_checkpoint(folder)
    config = read_config(folder)
    if has_shape_entry(folder) or misread((config.architectures or [""])[0], config):
        by = "billhook as architecture deci, with sizes per layer"
        convert = partial(_write_shaped, folder, out, converter, dtype)
    else:
        by = "llama.cpp's converter"
        convert = partial(converter.convert, folder, out, dtype, factors=rope_factors(config))
    if not any((Path(folder) / name).is_file() for name in (*FILES, "tokenizer.model")):
        reason = "the folder has no tokenizer"
        if not ids_only:
            raise WorkerError(reason)
        convert(False)
        return Written(by, reason)
    try:
        return Written(by, split=convert(True))
    except WorkerError as error:
        if not ids_only:
            raise
        try:
            convert(False)
        except WorkerError:
            raise error from None
        return Written(by, f"llama.cpp's converter cannot read the tokenizer ({error})")


def _write_shaped(folder: str, out: str | Path, converter: Converter, dtype: DType, vocabulary: bool) -> str | None:
    """Writes a billhook checkpoint as `deci`; returns the text splitting (see `Converter`)."""
    from billhook.serving.deci import save_template, write_deci  # it needs gguf, an extra

    with readable(folder):
        model = load_as(model_class(read_config(folder), folder), folder, "auto")
    if (limitation := deci_limitation(model.config)) is not None:
        problem = misread(type(model).__name__, model.config) or "its converter cannot express its heads and widths"
        raise WorkerError(f"llama.cpp: {problem}, and {limitation}")
    with tempfile.TemporaryDirectory() as near:
        small = Path(near, Path(folder).resolve().name)
        template = Path(near, "template.gguf")
        save_template(model, Path(folder), small)
        split = converter.convert(small, template, "f32", vocabulary, rope_factors(model.config))
        write_deci(model, template, Path(out), dtype)
    return split


GGUFKind = Literal["auto", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]
"""Number format of a GGUF file; `"auto"` is the dtype of the folder's weights."""
DTYPES: dict[str, DType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MAGIC = b"GGUF"


def export_gguf(folder: str | Path, out: str | Path, kind: GGUFKind = "auto", converter: str | Path | None = None) -> Written:
    """Writes a Hugging Face checkpoint as a GGUF file, atomically.

    llama.cpp's converter writes standard checkpoints. If layers differ, billhook writes llama.cpp's architecture `deci`, which
    has heads, KV heads, and widths per layer, for families that compute the same as a Llama.

    Args:
        folder: Hugging Face checkpoint with a tokenizer.
        out: Output file ending in .gguf: a new file, or a GGUF file to replace.
        kind: Number format of the weights: `"F32"`, `"F16"`, `"BF16"`, or quantized by llama.cpp: `"Q8_0"`, `"Q6_K"`, `"Q5_K_M"`,
            or `"Q4_K_M"`. `"auto"` keeps the dtype of the folder's weights.
        converter: Path of llama.cpp's `convert_hf_to_gguf.py`. Defaults to the installed one.

    Raises:
        ValueError: If an argument is not legal, or the folder cannot be converted.
        Missing: If the converter, or the engine that quantizes, is not installed. The message names the package.
    """
    check_gguf(out, kind)
    path = Path(out)
    quantized = kind in get_args(Kind)
    draft = path.with_name(f".{path.name}.draft")
    exact = draft.with_name(f"{draft.name}-exact") if quantized else draft
    dtype: DType = "f32"
    if kind == "auto" or quantized:
        with suppress(OSError, ValueError):  # a config that cannot be read is refused below
            config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            dtype = DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "", dtype)
    else:
        dtype = cast(DType, kind.lower())
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with Converter(converter) as running:
            written = write_gguf(str(folder), exact, running, dtype)
        if quantized:
            with LlamaCpp() as engine:
                engine.quantize(exact, draft, cast(Kind, kind))
        draft.replace(path)
    except WorkerError as error:
        raise ValueError(f"gguf: '{folder}' cannot be converted: {error}") from error
    finally:
        for file in {draft, exact}:
            file.unlink(missing_ok=True)
    return written


def check_gguf(out: str | Path, kind: GGUFKind = "auto") -> None:
    """Raises if a file must not be written, or for an unknown kind."""
    check_one_of("kind", kind, GGUFKind)
    check_path("gguf", out, [".gguf"])
    path = Path(out)
    other = path.is_dir()
    if path.is_file():
        with path.open("rb") as file:
            other = file.read(len(MAGIC)) != MAGIC
    if other:
        raise ValueError(f"gguf='{out}' exists and is not a GGUF file. Choose another file.")
