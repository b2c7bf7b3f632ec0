"""Tiny mixtures in the published quantized layouts, and readers of them that share no code with billhook."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from kit.families import SMALL

MIXTURES = {
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "hidden_size": 64,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "sliding_window": 8,
    },
}
DENSE = ("embed", "lm_head", "norm", "mlp.gate.", "sinks", "router", "bias")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def to_fp8(weight, block):
    """Values and scales of a matrix, block by block."""
    rows, columns = block
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    values = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            here = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = weight[here].float().abs().max() / 448
            values[here] = (weight[here].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return values, scales


def from_fp8(values, scales, block):
    """A matrix of values and scales, each times the scale of its block."""
    rows, columns = (torch.arange(size) // step for size, step in zip(values.shape, block, strict=True))
    return (values.float() * scales[rows][:, columns]).bfloat16()


def random_mxfp4(experts, rows, columns):
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(121, 124, (experts, rows, columns // 32), dtype=torch.uint8)


def from_mxfp4(blocks, scales):
    """A stack `[experts, columns, rows]` of four-bit values, the low one of each byte first."""
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    values = E2M1[codes % 8] * (1 - 2.0 * (codes // 8)) * 2.0 ** (scales[..., None].float() - 127)
    return values.flatten(-2).transpose(1, 2).contiguous().bfloat16()


def write(folder, family, block=(16, 16), **changes):
    """Writes a quantized mixture, and returns the model with the values that it stands for."""
    config = transformers.AutoConfig.for_model(family, **SMALL | MIXTURES[family] | {"initializer_range": 0.2} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "inv_freq" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    stored, dense = {}, {}
    for name, tensor in tensors_of(folder).items():
        if family == "gpt_oss" and tensor.dim() == 3:
            experts, columns, rows = tensor.shape
            parts = random_mxfp4(experts, rows, columns)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = parts
            dense[name] = from_mxfp4(*parts)
        elif family != "gpt_oss" and not any(part in name for part in DENSE):
            parts = to_fp8(tensor, block)
            stored[name], stored[f"{name}_scale_inv"] = parts
            dense[name] = from_fp8(*parts, block)
        else:
            stored[name] = dense[name] = tensor
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    fields = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    if family != "gpt_oss":
        fields = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    change_config(folder, quantization_config=fields)
    return model


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
