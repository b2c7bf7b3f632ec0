"""Models with stacks of blocks, and their influence."""

import torch
import transformers
from small_configs import small_config

MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "sliding_window": 4}


def other(name, **changes):
    """A small model of any class, with random weights."""
    kind = getattr(transformers, name)
    return kind(small_config(kind.config_class, **changes)).eval()


def t5(**changes):
    model = other("T5ForConditionalGeneration", num_layers=3, num_decoder_layers=4, **changes)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    return model


def influence(model, batch):
    """1 - cos of what each block takes and gives, over tokens that count, from the model's own hidden states."""
    last = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        states = [*model(**batch, output_hidden_states=True).hidden_states[:-1], last[0]]
    hook.remove()
    counts = batch["attention_mask"].bool()
    pairs = [(a[counts].double(), b[counts].double()) for a, b in zip(states, states[1:], strict=False)]
    return torch.stack([1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in pairs])
