"""Small models, cut by hand to shapes that their classes do not build from a config."""

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kit.families import SMALL, llama

HEAD = 8  # features of a head
HEADS = torch.tensor([0, 3])  # those of four that stay


def bert(**changes: object) -> PreTrainedModel:
    fields = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")}
    config = transformers.BertConfig(**fields | {"num_attention_heads": 4, "max_position_embeddings": 64} | changes)
    return transformers.BertForMaskedLM(config).eval()


def gpt2(**changes: object) -> PreTrainedModel:
    fields = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields | {"pad_token_id": 0} | changes)).eval()


def keep(module: nn.Module, indices: Tensor, dim: int, *attributes: str) -> None:
    """Keeps these rows or columns of a module's weight, and of its bias where that goes along, and tells its attributes."""
    outputs = dim == (1 if type(module).__name__ == "Conv1D" else 0)
    for name, along in [("weight", dim), *([("bias", 0)] if outputs and module.bias is not None else [])]:
        setattr(module, name, nn.Parameter(getattr(module, name).detach().index_select(along, indices).clone()))
    for attribute in attributes:
        setattr(module, attribute, len(indices))


def features(heads: Tensor) -> Tensor:
    return (heads[:, None] * HEAD + torch.arange(HEAD)).flatten()


def bert_of_two_heads() -> PreTrainedModel:
    model = bert()
    for layer in model.bert.encoder.layer:
        attention, kept = layer.attention.self, features(HEADS)
        for linear in (attention.query, attention.key, attention.value):
            keep(linear, kept, 0, "out_features")
        keep(layer.attention.output.dense, kept, 1, "in_features")
        attention.num_attention_heads, attention.all_head_size = len(HEADS), len(kept)
    return model


def gpt2_of_two_heads() -> PreTrainedModel:
    """In its first layer."""
    model = gpt2()
    attention, kept = model.transformer.h[0].attn, features(HEADS)
    keep(attention.c_attn, torch.cat([kept + part * attention.split_size for part in range(3)]), 1, "nf")
    keep(attention.c_proj, kept, 0, "nx")
    attention.num_heads, attention.split_size = len(HEADS), len(kept)
    return model


def uneven_llama(**changes: object) -> PreTrainedModel:
    """With 48 channels in its first layer, and 20 in its second."""
    model = llama(**changes)
    narrow(model, 1, 20)
    return model


def narrow(model: PreTrainedModel, layer: int, width: int) -> None:
    mlp = model.model.layers[layer].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        keep(linear, torch.arange(width), 0, "out_features")
    keep(mlp.down_proj, torch.arange(width), 1, "in_features")
    mlp.intermediate_size = width


def narrow_tied_llama() -> PreTrainedModel:
    """All of it narrower than its config says, and its second layer's channels fewer, with tied embeddings."""
    model = llama(hidden_size=16, head_dim=4, tie_word_embeddings=True)
    narrow(model, 1, 20)
    model.config.hidden_size = 32
    return model


def uneven_mixtral() -> PreTrainedModel:
    """With narrower experts in its second layer; transformers changes the format of experts as it saves."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, head_dim=4)
    model = transformers.MixtralForCausalLM(config).eval()
    experts, kept = model.model.layers[1].mlp.experts, torch.arange(16)
    gate_up = experts.gate_up_proj.detach()[:, torch.cat([kept, kept + experts.intermediate_dim])]
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(x.clone()) for x in (gate_up, experts.down_proj.detach()[..., kept]))
    experts.intermediate_dim = len(kept)
    return model


PLAIN = {"bert": bert, "gpt2": gpt2, "llama": llama}
SHAPED = {"bert": bert_of_two_heads, "gpt2": gpt2_of_two_heads, "llama": uneven_llama}
