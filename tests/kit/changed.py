"""Small models and what billhook changes in them, for what reads a model from outside: compilers, exporters."""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import billhook as bh
from kit import kv_zoo
from kit.families import build, llama
from kit.shaped import gpt2


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**kv_zoo.IDS | kv_zoo.BASE, num_labels=3, initializer_range=0.3)
    return transformers.BertForSequenceClassification(config).eval()


def cut(model: PreTrainedModel) -> None:
    """Removes a block and a quarter of the hidden dimensions, and heads and channels in the first of the two layers left."""
    bh.pruning.prune_units(model, {0: [1]}, kind="block")
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), residual=0.25))
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(heads=0.5, channels=0.3, last=1)))


def without(heads: dict[int, list[int]]) -> Callable[[PreTrainedModel], object]:
    return partial(bh.pruning.prune_units, units=heads)


def with_kv_heads(left: int, layers: list[int] | None = None) -> Callable[[PreTrainedModel], object]:
    return partial(bh.convert_kv_heads, num_key_value_heads=left, method="mean", layers=layers)


# the dense model, and what changes it
CHANGES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], object]]] = {
    "llama": (partial(llama, num_hidden_layers=3), cut),
    "bert": (bert, without({0: [0, 3, 5], 1: [2]})),
    "experts": (partial(build, "qwen3_moe", num_hidden_layers=1), without({0: [0, 2, 4, 6]})),
    "t5": (partial(kv_zoo.build, "t5", num_layers=1), with_kv_heads(1)),
    "gpt_neox": (partial(kv_zoo.build, "gpt_neox", num_hidden_layers=1), without({0: [0]})),
    "opt": (partial(kv_zoo.build, "opt"), without({0: [0]})),
    "gpt2": (partial(gpt2, n_head=8), without({0: [0, 1]})),
}


def changed(name: str) -> PreTrainedModel:
    dense, change = CHANGES[name]
    model = dense()
    change(model)
    return model


def asked(model: PreTrainedModel, rows: int = 2, length: int = 12, padded: int = 0) -> dict[str, Tensor]:
    """Texts, the first of which begins with padding; of an encoder-decoder also what it has written."""
    ids = torch.randint(3, model.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    own = {"input_ids": ids, "attention_mask": mask}
    return own | {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else own
