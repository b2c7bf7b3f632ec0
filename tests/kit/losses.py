"""Small models to repair, or with a loss that depends on every weight, and embedded text."""

import pyarrow.parquet as pq
import torch
import transformers

from billhook.assets import model_path, text_files
from kit.families import llama

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


BERT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}


ALBERT = BERT | {"embedding_size": 16, "num_hidden_layers": 3}


BUILD = {
    "llama": llama,
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**ALBERT)),
}


def embedded_text(split, rows):
    """Some windows of 128 tokens."""
    text = " ".join(pq.read_table(text_files()[split])["text"].to_pylist())[:60000]
    ids = transformers.AutoTokenizer.from_pretrained(model_path("tiny"))(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: rows * 128]).view(rows, 128)


def loud(model):
    """Weights so large that losses depend on them, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().double()


LOUD = {
    "llama": lambda: loud(llama()),
    "mha": lambda: loud(llama(num_key_value_heads=8)),
    "bert": lambda: loud(transformers.BertForMaskedLM(transformers.BertConfig(**BERT))),
    "gpt2": lambda: loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))),
}


def own_loss(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss
