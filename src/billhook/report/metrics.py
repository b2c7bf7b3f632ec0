"""Perplexity of a language model, and accuracy of a classifier."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from billhook.bar import Told
from billhook.calibration.reading import Rows
from billhook.engine.passes import together
from billhook.report.generation import generates


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Rows | None, examples: int, progress: Told | None = None) -> float | None:
    """Measures exp of the mean negative log-likelihood of each next token; None for a model that predicts none.

    `progress` is called with how many rows have been read, and how many will be.
    """
    if rows is None or not examples or not generates(model):
        return None
    every: Any = rows
    texts = [torch.tensor([every[number]["input_ids"]], device=model.device) for number in range(min(examples, len(every)))]
    losses = dict[int, Tensor]()

    def read(number: int) -> None:
        logits = model(input_ids=texts[number], use_cache=False).logits[0, :-1].float()
        losses[number] = cross_entropy(logits, texts[number][0, 1:], reduction="none").cpu().double().sum()
        if progress is not None:
            progress(len(losses), len(texts))

    together(model, [partial(read, number) for number in range(len(texts))])
    return math.exp(sum(losses.values()) / sum(ids.shape[1] - 1 for ids in texts))


@torch.no_grad()
def accuracy(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float | None:
    """Measures the share of examples whose label has the highest logit; None if there are no examples."""
    right = list[bool]()
    for batch in batches:
        inputs: dict[str, Any] = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
            if name != "labels"
        }
        right += (model(**inputs).logits.argmax(-1).cpu() == batch["labels"]).tolist()
    return sum(right) / len(right) if right else None
