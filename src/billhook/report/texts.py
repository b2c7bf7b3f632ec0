"""The text of examples, which models with different tokenizers can be compared on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine.passes import run_side_by_side
from billhook.progress import OnProgress
from billhook.report.predictions import mean_loss


@dataclass(frozen=True)
class Example:
    """Token ids of an example, and the number of its first tokens that are not predicted."""

    ids: Tensor
    first: int = 1

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class ExampleText:
    """The text of an example: that of its first token, and the rest, which is predicted."""

    first: str
    rest: str

    @classmethod
    def of(cls, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Decodes an example, `[tokens]`."""
        parts = (tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False) for part in (ids[:1], ids[1:]))
        return cls(*map(str, parts))

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> Example:
        """Returns the tokens of the text."""
        first, rest = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (self.first, self.rest))
        return Example(torch.tensor(first + rest), max(len(first), 1))

    @property
    def bytes(self) -> int:
        """The number of bytes that are predicted."""
        return len(self.rest.encode())


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[ExampleText],
    progress: OnProgress | None = None,
) -> tuple[float, float]:
    """Returns the bits per byte of texts, and the tokens per byte.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The texts.
        progress: Callback with the number of finished examples and the total.
    """
    examples, losses = [text.encoded(tokenizer) for text in texts], dict[int, float]()

    def read(number: int) -> None:
        example = examples[number]
        ids = example.ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, example.first - 1 : -1]
        losses[number] = mean_loss(logits, ids[example.first :]) * example.predicted  # in nats
        if progress is not None:
            progress(len(losses), len(examples))

    run_side_by_side(model, [partial(read, number) for number in range(len(examples))])
    size, tokens = sum(text.bytes for text in texts), sum(example.predicted for example in examples)
    return sum(losses.values()) / math.log(2) / size, tokens / size
