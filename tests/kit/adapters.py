"""Small models with LoRA attached, and masks on them."""

import peft
import torch
import transformers

import billhook as bh
from kit.families import llama

IDS = torch.arange(3, 35).view(2, 16)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


BUILD = {"llama": llama, "gpt2": gpt2, "t5": t5}


def lora(model, **options):
    """LoRA that does something, on all linears unless said otherwise."""
    conv1d = isinstance(model, transformers.GPT2LMHeadModel)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "fan_in_fan_out": conv1d} | options)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return wrapped.eval()


def pruned(build, **options):
    """A half-empty model with such LoRA."""
    torch.manual_seed(0)
    model = BUILD[build]()
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    return lora(model, **options), masks


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj
