"""Scores of tokens: how often text uses them, and how often the model expects them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.engine import (
    SINGLE_PROCESS,
    Batch,
    Comm,
    Run,
    evaluating_without_grad,
    inputs_of,
    run_side_by_side,
    runs_of,
    source_of,
    store_of,
    token_outputs,
)
from billhook.model import named_token_ids
from billhook.units import Units
from billhook.vocabulary.tokenizer import Vocabulary

DISCOUNT = 0.75
"""What is taken off each count: absolute discounting (Ney, Essen & Kneser, 1994) of what is rare in a sample."""
EXPECTED = 0.5
"""Weight of the model's predictions beside the counts. Both were chosen on training text."""
PREDICTED = 2**14
"""Maximum number of tokens of each source that the model reads for its predictions."""
ELEMENTS = 2**22
"""Number of logits to process at once."""


def token_shares(batches: Iterable[Any], size: int, comm: Comm = SINGLE_PROCESS) -> tuple[Tensor, int]:
    """Returns the discounted share of each token, summed over sources: float64, `[size]`.

    Padding (`attention_mask`) does not count; labels of an encoder-decoder do. Also returns the number of sources.

    Raises:
        ValueError: If a batch has no ids, others than those of the vocabulary, or a mask of another shape.
    """
    counts = dict[str, Tensor]()
    for batch in batches:
        count = counts.setdefault(source_of(batch), torch.zeros(size, dtype=torch.float64))
        inputs = inputs_of(batch)
        if not isinstance(inputs, Mapping) or not {"input_ids", "decoder_input_ids"} & inputs.keys():
            has = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"batches: one has no input_ids to count tokens in ({has}). Pass dictionaries with input_ids.")
        counted = []
        labels = inputs.get("labels")
        for name, padding in {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.items():
            ids = inputs.get(name)
            mask = inputs.get(padding)
            if ids is None:
                continue
            if not isinstance(ids, Tensor) or ids.is_floating_point():
                raise ValueError(f"batches: {name} must be a tensor of token ids, not a {type(ids).__name__}. Use torch.tensor.")
            if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
                raise ValueError(
                    f"batches: {padding} must have the shape of {name}, {list(ids.shape)}, to tell padding. Pass such a mask."
                )
            counted.append(ids if mask is None else ids[mask.bool()])
        if "decoder_input_ids" not in inputs and isinstance(labels, Tensor) and labels.dim() == 2:  # of a language model
            counted.append(labels[labels >= 0])
        for ids in counted:
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise ValueError(
                    f"batches: token ids are in {int(ids.min())}..{int(ids.max())}, but must be in 0..{size - 1}. Use the "
                    "model's tokenizer."
                )
            count += torch.bincount(ids.flatten().cpu(), minlength=size)
    sources = {source for names in comm.gather(sorted(counts)) for source in names}
    shares = torch.zeros(size, dtype=torch.float64)
    for source in sorted(sources):
        count = comm(counts.get(source, torch.zeros_like(shares)).to(comm.device)).cpu()
        shares += (count - DISCOUNT).clamp(min=0) / count.sum().clamp(min=1)
    return shares, len(sources)


def predicted_shares(model: PreTrainedModel, size: int, batches: Sequence[Any], comm: Comm = SINGLE_PROCESS) -> Tensor:
    """Returns each token's mean probability, `[size]`, float64; zeros without predictions."""
    by_source = defaultdict(list)
    for batch in batches:
        inputs = inputs_of(batch)
        decodes = not model.config.is_encoder_decoder or {"labels", "decoder_input_ids"} & inputs.keys()
        if "input_ids" in inputs and decodes:
            by_source[source_of(batch)].append(Batch(inputs, source_of(batch)))
    chosen = []  # evenly spaced batches of each source
    for of_source in by_source.values():
        tokens = sum(batch["input_ids"].numel() for batch in of_source)
        chosen += of_source[:: max(-(-tokens // PREDICTED), 1)]
    sums = torch.zeros(size, dtype=torch.float64)

    def read(run: Run) -> None:
        outputs = token_outputs(run)
        if outputs is None or not outputs.is_logits or outputs.values.shape[-1] != size:
            return
        for part in torch.split(outputs.values, max(ELEMENTS // size, 1)):
            sums.add_(part.float().softmax(-1).sum(0).cpu())

    with evaluating_without_grad(model), store_of(model).independently(comm):
        run_side_by_side(model, [partial(read, run) for run in runs_of(model, chosen)])
    sums = comm(sums.to(comm.device)).cpu()
    return sums / sums.sum().clamp(min=1)


def token_scores(
    model: PreTrainedModel,
    units: Mapping[str, Units],
    batches: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    comm: Comm = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Returns scores by which the lowest tokens can go: float64, `[tokens]`.

    The more text uses a token and the model expects it, the higher its score; a token that another is made of has a higher score
    than that. Tokens that must stay (`Vocabulary.order`, and those that the config names) have an infinite score.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or cannot lose any, or the batches have no ids.
    """
    if not any(comm.gather(len(batches))):
        raise ValueError("batches is empty. Pass text to count tokens in.")
    vocabulary = Vocabulary(tokenizer)
    scores = {}
    for name, layer in units.items():
        size = layer.count()
        vocabulary.check_within(size)
        shares, sources = token_shares(batches, size, comm)
        worth = shares + EXPECTED * sources * predicted_shares(model, size, batches, comm)
        _, others = vocabulary.order(worth.numpy(), shares.nonzero().flatten().numpy(), named_token_ids(model, size).keys())
        scores[name] = torch.full((size,), torch.inf, dtype=torch.float64)
        scores[name][others] = torch.arange(len(others), 0, -1, dtype=torch.float64)
    return comm.decide(lambda: scores)
