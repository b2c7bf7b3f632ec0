"""Small models with random weights of every family that the tests speak of."""

import torch
import transformers
from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# what each family needs beside SMALL; those with a fixed default head_dim get one that is not hidden / heads
EXTRA = {
    "llama": {},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "ministral3": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "olmo": {},
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "phi": {"qk_layernorm": False},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "granite": {},
    "nemotron": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def build(family: str, **changes: object) -> PreTrainedModel:
    """A causal language model of a family, with every parameter (biases and norms too) random, in eval mode."""
    config = transformers.AutoConfig.for_model(family, **SMALL | EXTRA[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llama(**changes: object) -> transformers.LlamaForCausalLM:
    return build("llama", **changes)


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], (rows, length))


BERT = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


T5 = {
    "vocab_size": 2048,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def t5():
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**config, decoder_start_token_id=0)).eval()


MLPS = ["model.layers.0.mlp", "model.layers.1.mlp"]  # of families.llama: 48 channels each, 32 hidden dimensions


ATTENTIONS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def recompute(model, options=None):
    """Has a model recompute its activations in the backward; releases of transformers call it otherwise."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
