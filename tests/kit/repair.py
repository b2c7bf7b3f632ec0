"""Small models to repair, and embedded text."""

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
