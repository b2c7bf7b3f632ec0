"""GGUF files of llama.cpp's architecture `deci`: a Llama whose layers may differ in size.

Its graph is `src/models/deci.cpp` of llama.cpp, and its tensor names are from `conversion/deci.py` (Nemotron, NVIDIA and Deci).
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook.serving.converter import DType

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
TYPES: dict[DType, Any] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
SIZE_KEYS = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""Keys whose values in the template file are not the model's."""


def save_template(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """Saves a minimal Llama with a model's rotary positions, vocabulary, and tokenizer.

    llama.cpp's converter writes the GGUF fields of vocabulary and positions from it.
    """
    config: Any = model.config
    parts, width = _parts_and_width(model)
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copy(path, out)
    small = LlamaConfig(
        vocab_size=len(parts.embed_tokens.weight),
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


def write_deci(model: PreTrainedModel, template: Path, out: Path, dtype: DType) -> None:
    """Writes a model as a GGUF file of the architecture `deci`.

    Args:
        model: Model for which `deci_limitation` is None.
        template: GGUF file of its template (see `save_template`).
        out: Output file.
        dtype: Data type of matrices. Vectors are float32.
    """
    parts, width = _parts_and_width(model)
    read = GGUFReader(template)
    heads, kv_heads, widths, tensors = zip(*(_layer(layer, width) for layer in parts.layers), strict=True)
    writer = GGUFWriter(out, "deci", use_temp_file=True)
    skipped = ["general.architecture", "general.size_label", "general.file_type", *(f"llama.{name}" for name in SIZE_KEYS)]
    for key, field in read.fields.items():
        if not key.startswith("GGUF.") and key not in skipped:
            inside = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            name = f"deci.{key.removeprefix('llama.')}" if key.startswith("llama.") else key
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inside)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_embedding_length(parts.embed_tokens.weight.shape[1])
    writer.add_block_count(len(heads))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(widths)
    head = cast(Any, model).get_output_embeddings()
    all_tensors = {"token_embd.weight": parts.embed_tokens.weight, "output_norm.weight": parts.norm.weight}
    if isinstance(head, nn.Linear) and head.weight is not parts.embed_tokens.weight:
        all_tensors["output.weight"] = head.weight
    for number, layer_tensors in enumerate(tensors):
        all_tensors |= {f"blk.{number}.{name}": tensor for name, tensor in layer_tensors.items()}
    for name, values in all_tensors.items():
        kind = TYPES[dtype][0] if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values.detach().float().cpu().numpy(), kind), raw_dtype=kind)
    for tensor in read.tensors:
        if tensor.name.startswith("rope_"):  # frequency factors of scaled rotary positions
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts_and_width(model: PreTrainedModel) -> tuple[Any, int]:
    """Returns the decoder (embeddings, layers, and norm), and the head dimension."""
    parts: Any = model.base_model
    return parts, int(parts.layers[0].self_attn.head_dim)


def _layer(layer: Any, width: int) -> tuple[int, int, int, dict[str, Tensor]]:  # noqa: ANN401 - a layer of any family
    """Returns heads, KV heads, width, and tensors by GGUF name, in llama.cpp's rotary order."""
    attention = layer.self_attn
    mlp = layer.mlp
    tensors = {}
    modules = {"attn_output": attention.o_proj, "ffn_down": mlp.down_proj}
    modules |= {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
    if hasattr(attention, "qkv_proj"):  # Phi-3's
        size = attention.num_key_value_heads * width
        for part, values in _parameters(attention.qkv_proj).items():
            sizes = [len(values) - 2 * size, size, size]
            tensors[f"attn_q.{part}"], tensors[f"attn_k.{part}"], tensors[f"attn_v.{part}"] = torch.split(values, sizes)
        for part, values in _parameters(mlp.gate_up_proj).items():
            tensors[f"ffn_gate.{part}"], tensors[f"ffn_up.{part}"] = values.chunk(2)
    else:
        modules |= {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj}
        modules |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj}
    for name, module in modules.items():
        tensors |= {f"{name}.{part}": values for part, values in _parameters(module).items()}
    for name in tensors:
        if name.startswith(("attn_q.", "attn_k.")):
            rows = tensors[name]  # from transformers' to llama.cpp's rotary order
            tensors[name] = rows.reshape(-1, 2, width // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
    queries = len(tensors["attn_q.weight"])
    keys = len(tensors["attn_k.weight"])
    return queries // width, keys // width, len(tensors["ffn_up.weight"]), tensors


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
