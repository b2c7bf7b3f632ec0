"""Models without some heads, whose numbers their config cannot say or engines do not read, and what one computes."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from billhook.pruning.planning import prune_units
from kit.families import build

FOUR = {"num_attention_heads": 4, "num_key_value_heads": 4}


def three_of_four(family: str = "llama", **changes: object) -> PreTrainedModel:
    """With three of four query heads for each of what the config says, which does not divide the width of 32."""
    model = build(family, **FOUR | changes)
    groups = model.config.num_attention_heads // 4
    prune_units(model, {0: [1], 1: [2]} if groups == 1 else {0: [2, 3], 1: [4, 5]})
    return model


def written(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def answers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits, of a padded batch too, and what is generated with a cache and without."""
    ids = torch.arange(60).view(2, 30)
    padding = torch.ones_like(ids)
    padding[0, :7] = 0
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    return [model(ids).logits, model(ids, attention_mask=padding).logits, cached, plain]


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(answers(a), answers(b), strict=True))
