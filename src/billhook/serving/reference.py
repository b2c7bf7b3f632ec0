"""A folder as transformers computes it: the model, tokens that it wrote, its logits and its greedy tokens."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from billhook.calibration.generated import check_writes, generated
from billhook.engine.state import overridden, undisturbed
from billhook.model.config_fields import text_config
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.shapes.shaped import load_as, readable


def load_reference(folder: str) -> PreTrainedModel:
    """Loads a folder in float32 with attention as it is written down in its class: faster ones leave out soft caps.

    Raises:
        ValueError: If it is no checkpoint that billhook loads, or its model writes no text.
    """
    check_checkpoint(folder)
    kind = model_class(read_config(folder), folder)
    with readable(folder):
        model = load_as(kind, folder, torch.float32)
    check_writes(model)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    return model


def most_tokens(model: PreTrainedModel, wanted: int) -> int:
    """Returns how many tokens a row may have, of those wanted."""
    config: Any = text_config(model.config)
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def written_tokens(model: PreTrainedModel, length: int) -> list[int]:
    """Returns a row that the model wrote itself, drawn from its own distribution, or random tokens if none begins a text."""
    try:
        return [int(token) for token in generated(model, examples=1, length=length)[0]["input_ids"][0]]
    except ValueError:
        embeddings: Any = model.get_input_embeddings()
        size = len(embeddings.weight)
        return torch.randint(size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def logits_of(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Returns the logits after each token of a row: [tokens, vocabulary], float32."""
    with undisturbed(model):
        logits: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].float()


def greedy_of(model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
    """Returns the `count` tokens that follow a row by always taking the most likely one, past the ends of texts."""
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=True
    )  # fmt: skip
    ids, write = torch.tensor([list(tokens)]), cast(Any, model.generate)
    with undisturbed(model), overridden(model, generation_config=how):  # which would add what `how` leaves open
        found: list[int] = write(ids, attention_mask=torch.ones_like(ids), generation_config=how)[0, len(tokens) :].tolist()
    return found
