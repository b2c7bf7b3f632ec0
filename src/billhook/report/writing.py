"""Text that a model writes after prompts: whether it loops, how long it is, and whether it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine import evaluating_without_grad, overridden
from billhook.model import text_config

PROMPT_TOKENS = 32
NEW_TOKENS = 256
TEMPERATURES = (0.0, 0.7)
"""Greedy decoding, and sampling."""
REPEATS, SHORTEST = 3, 2
"""A text that does not end loops if its last phrase of at least two tokens repeats three times (Holtzman et al., 2019, table 1,
https://arxiv.org/abs/1904.09751)."""
GRAM, DISTINCT = 4, 0.55
"""A text loops, too, if fewer of its 4-grams are distinct (distinct-n: Li et al., 2015, https://arxiv.org/abs/1510.03055)."""
ENDED = -1
"""Stands in rows of tokens for all from the end token."""
CONTINUE = "Continue this text:\n\n{}"
"""The user's message to a model with a chat template."""


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a prompt: the text, or a chat that asks to continue it if there is a chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    chat = [{"role": "user", "content": CONTINUE.format(text)}]
    encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def write(model: PreTrainedModel, prompts: Sequence[Sequence[int]], temperature: float, seed: int = 0) -> Tensor:
    """Continues prompts by `NEW_TOKENS` tokens, or until the model ends the text.

    Args:
        model: A causal language model.
        prompts: Tokens of each prompt.
        temperature: Sampling temperature; 0 takes the most likely token.
        seed: Sampling seed. The random state is as before afterward.

    Returns:
        The new tokens, int64, `[prompts, NEW_TOKENS]`, on the CPU; `ENDED` from the end token on.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = text_config(model.config).eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    settings = GenerationConfig(**sampling, max_new_tokens=NEW_TOKENS, eos_token_id=ends or None, pad_token_id=0, use_cache=True)  # type: ignore[no-untyped-call]
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating_without_grad(model), torch.random.fork_rng(devices), overridden(model, generation_config=settings):
        torch.manual_seed(seed)
        rows = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].cpu()  # type: ignore[operator]
    written = torch.full((len(prompts), NEW_TOKENS), ENDED)
    written[:, : rows.shape[1]] = rows
    ended = torch.isin(written, torch.tensor(ends or [ENDED])).cumsum(1) > 0
    return written.masked_fill(ended, ENDED)


@dataclass(frozen=True)
class Writing:
    """What a model has written.

    Attributes:
        loops: Whether each text loops.
        distinct: Mean share of 4-grams that are distinct.
        tokens: Mean number of new tokens.
        ended: Share of texts that the model ended.
    """

    loops: tuple[bool, ...]
    distinct: float
    tokens: float
    ended: float

    @classmethod
    def of(cls, written: Tensor) -> Self:
        """Judges rows of new tokens, `[texts, tokens]`."""
        rows = [[token for token in row if token != ENDED] for row in written.tolist()]
        ended = [len(row) < written.shape[1] for row in rows]
        distinct = list(map(distinct_share, rows))
        loops = [share < DISTINCT or (repeats(row) and not end) for row, end, share in zip(rows, ended, distinct, strict=True)]
        count = len(rows)
        return cls(tuple(loops), sum(distinct) / count, sum(map(len, rows)) / count, sum(ended) / count)

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.loops)

    @property
    def loop_share(self) -> float:
        """Share of texts that loop."""
        return sum(self.loops) / self.texts

    def new_loops(self, dense: "Writing") -> tuple[float, float]:
        """Returns the share of texts that loop where the dense model's do not, and its standard error.

        The error is of Agresti and Coull's estimate, which is not 0 if no text loops.
        """
        count = sum(now and not then for now, then in zip(self.loops, dense.loops, strict=True))
        share = (count + 2) / (self.texts + 4)
        return count / self.texts, math.sqrt(share * (1 - share) / (self.texts + 4))


def distinct_share(row: Sequence[int]) -> float:
    """Returns the share of 4-grams that are distinct; 1 without any.

    >>> distinct_share([1, 2, 3, 4, 5]), distinct_share([1, 1, 1, 1, 1])
    (1.0, 0.5)
    """
    grams = list(zip(*(row[start:] for start in range(GRAM)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repeats(row: Sequence[int]) -> bool:
    """Returns whether a text's last phrase repeats.

    >>> repeats([7, 1, 2, 1, 2, 1, 2]), repeats([1, 2, 1, 2, 1, 2, 7])
    (True, False)
    """
    lengths = range(SHORTEST, len(row) // REPEATS + 1)
    return any(list(row[-REPEATS * length :]) == [*row[-length:]] * REPEATS for length in lengths)
