"""Small models and their loss."""

import torch
import transformers

from kit.families import llama

CONFIG = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}


GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def loud(model):
    """Weights so large that losses depend on them, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().double()


BUILD = {
    "llama": lambda: loud(llama()),
    "mha": lambda: loud(llama(num_key_value_heads=8)),
    "bert": lambda: loud(transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG))),
    "gpt2": lambda: loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))),
}


def own_loss(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss
