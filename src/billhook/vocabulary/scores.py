"""Scores of tokens: how often text uses them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.engine.batches import Run, source_of
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.model.token_ids import named_token_ids
from billhook.units.units import Units
from billhook.vocabulary.tokenizer import Vocabulary


def token_shares(batches: Iterable[Any], size: int, comm: Comm = SINGLE_PROCESS) -> Tensor:
    """Returns the share of each token in the text, summed over sources: float64, `[size]`.

    Padding (`attention_mask`) does not count; labels of an encoder-decoder do.
    """
    counts = dict[str, Tensor]()
    for batch in batches:
        inputs = batch.batch if isinstance(batch, Run) else batch
        count = counts.setdefault(source_of(batch), torch.zeros(size, dtype=torch.float64))
        for name, mask in {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.items():
            if name in inputs:
                ids = inputs[name] if inputs.get(mask) is None else inputs[name][inputs[mask].bool()]
                count += torch.bincount(ids.flatten().cpu(), minlength=size)
        labels = inputs.get("labels")
        if "decoder_input_ids" not in inputs and isinstance(labels, Tensor) and labels.dim() == 2:  # of a language model
            count += torch.bincount(labels[labels >= 0].cpu(), minlength=size) if "input_ids" in inputs else 0
    shares = torch.zeros(size, dtype=torch.float64)
    for source in sorted({source for sources in comm.gather(sorted(counts)) for source in sources}):
        count = comm(counts.get(source, torch.zeros_like(shares)).to(comm.device)).cpu()
        shares += count / count.sum().clamp(min=1)
    return shares


def order_tokens(
    model: PreTrainedModel, size: int, vocabulary: Vocabulary, batches: Iterable[Any], comm: Comm = SINGLE_PROCESS
) -> tuple[list[int], list[int]]:
    """Returns the ids that stay, and all others, the most used first; see `Vocabulary.order`.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """
    vocabulary.check_within(size)
    shares = token_shares(batches, size, comm)
    return vocabulary.order(shares.numpy(), named_token_ids(model, size).keys())


def token_scores(
    model: PreTrainedModel,
    units: Mapping[str, Units],
    batches: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    comm: Comm = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Returns scores by which the lowest tokens can go: float64, `[tokens]`.

    The more text uses a token, the higher its score; a token that another is made of has a higher score than that. Tokens that
    must stay (`Vocabulary.order`, and those that the config names) have an infinite score.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or cannot lose any.
    """
    vocabulary, scores = Vocabulary(tokenizer), dict[str, Tensor]()
    for name, layer in units.items():
        size = layer.count()
        _, others = order_tokens(model, size, vocabulary, batches, comm)
        scores[name] = torch.full((size,), torch.inf, dtype=torch.float64)
        scores[name][others] = torch.arange(len(others), 0, -1, dtype=torch.float64)
    return comm.decide(lambda: scores)
