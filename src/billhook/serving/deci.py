"""GGUF of llama.cpp's architecture `deci`: a Llama in which each layer has heads, KV heads and a width of its own.

Its graph is `src/models/deci.cpp` of llama.cpp, its names are those of `conversion/deci.py` (Nemotron of NVIDIA and Deci).
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook.model.repeat_kv import repeat_layout_of
from billhook.serving.converter import DType
from billhook.serving.engines import refused_by_deci

SHAPED = "llama.cpp's converter cannot say its heads and widths, as where layers differ"
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
TYPES: dict[DType, Any] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
OWN = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""Keys of which a twin's values are not the model's."""


@dataclass(frozen=True)
class Layer:
    """The numbers of a layer, and its tensors by their names in GGUF, queries and keys as llama.cpp rotates them."""

    heads: int
    kv_heads: int
    width: int
    tensors: dict[str, Tensor]


def why_not(model: PreTrainedModel) -> str | None:
    """Says why a model is none of those that `deci` computes; None if it is."""
    if (why := refused_by_deci(model.config)) is not None:
        return f"{SHAPED}, and {why}"
    if any(repeat_layout_of(module) is not None for module in model.modules()):
        return "it hands out fewer heads than it computes with, which no architecture of llama.cpp does"
    return None


def save_twin(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """Saves the smallest Llama that has a model's positions and number of tokens, with the other files of its folder.

    llama.cpp's converter makes of it what a GGUF file says of vocabulary and positions.
    """
    config: Any = model.config
    width = _width(model)
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copy(path, out)
    small = LlamaConfig(
        vocab_size=len(_parts(model).embed_tokens.weight),
        hidden_size=width,
        head_dim=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(small).save_pretrained(out)


def write_deci(model: PreTrainedModel, twin: Path, out: Path, dtype: DType) -> None:
    """Writes a model as GGUF of the architecture `deci`.

    Args:
        model: One of which `why_not` says nothing.
        twin: The GGUF file of its twin.
        out: The file to write.
        dtype: Of matrices; vectors are float32.
    """
    parts, read = _parts(model), GGUFReader(twin)
    layers = [_layer(layer, _width(model)) for layer in parts.layers]
    writer = GGUFWriter(out, "deci", use_temp_file=True)
    _copy_fields(read, writer)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_embedding_length(parts.embed_tokens.weight.shape[1])
    writer.add_block_count(len(layers))
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_feed_forward_length([layer.width for layer in layers])
    for name, values in _all_tensors(model, layers):
        kind = TYPES[dtype][0] if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values.detach().float().cpu().numpy(), kind), raw_dtype=kind)
    for tensor in read.tensors:
        if tensor.name.startswith("rope_"):  # what scaled positions divide their frequencies by
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(model: PreTrainedModel) -> Any:  # noqa: ANN401 - a decoder of any family
    """Returns the part of a model with embeddings, layers and norm."""
    return model.base_model


def _width(model: PreTrainedModel) -> int:
    """Returns the width of a head."""
    return int(_parts(model).layers[0].self_attn.head_dim)


def _copy_fields(read: GGUFReader, writer: GGUFWriter) -> None:
    """Copies what a twin's file says, except for its sizes."""
    skipped = ["general.architecture", "general.size_label", "general.file_type", *(f"llama.{name}" for name in OWN)]
    for key, field in read.fields.items():
        if key.startswith("GGUF.") or key in skipped:
            continue
        kind = field.types[0]
        inside = field.types[-1] if kind == GGUFValueType.ARRAY else None
        name = f"deci.{key.removeprefix('llama.')}" if key.startswith("llama.") else key
        writer.add_key_value(name, field.contents(), kind, sub_type=inside)


def _all_tensors(model: PreTrainedModel, layers: list[Layer]) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of a model by their names in GGUF."""
    parts, head = _parts(model), cast(Any, model).get_output_embeddings()
    yield "token_embd.weight", parts.embed_tokens.weight
    yield "output_norm.weight", parts.norm.weight
    if isinstance(head, nn.Linear) and head.weight is not parts.embed_tokens.weight:
        yield "output.weight", head.weight
    for number, layer in enumerate(layers):
        for name, tensor in layer.tensors.items():
            yield f"blk.{number}.{name}", tensor


def _layer(layer: Any, width: int) -> Layer:  # noqa: ANN401 - a layer of any family
    """Reads a layer, whose heads have a width."""
    attention, mlp, tensors = layer.self_attn, layer.mlp, dict[str, Tensor]()
    modules = {"attn_output": attention.o_proj, "ffn_down": mlp.down_proj}
    modules |= {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
    if hasattr(attention, "qkv_proj"):  # Phi-3's
        rows = attention.num_key_value_heads * width
        for part, values in _own(attention.qkv_proj).items():
            three = torch.split(values, [len(values) - 2 * rows, rows, rows])
            tensors |= {f"{name}.{part}": some for name, some in zip(("attn_q", "attn_k", "attn_v"), three, strict=True)}
        for part, values in _own(mlp.gate_up_proj).items():
            tensors[f"ffn_gate.{part}"], tensors[f"ffn_up.{part}"] = values.chunk(2)
    else:
        modules |= {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj}
        modules |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj}
    for name, module in modules.items():
        tensors |= {f"{name}.{part}": values for part, values in _own(module).items()}
    for name in tensors:
        if name.startswith(("attn_q.", "attn_k.")):
            tensors[name] = _pairs(tensors[name], width)
    heads, kv_heads = (len(tensors[f"{name}.weight"]) // width for name in ("attn_q", "attn_k"))
    return Layer(heads, kv_heads, len(tensors["ffn_up.weight"]), tensors)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Returns weight and bias of a module."""
    return {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}


def _pairs(rows: Tensor, width: int) -> Tensor:
    """Orders the rows of queries or keys in pairs: transformers turns feature i with i + width / 2, llama.cpp 2i with 2i + 1."""
    return rows.reshape(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
