"""Text that a model writes after prompts: whether it loops, its length, and its end."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine import SINGLE_PROCESS, Comm, evaluating_without_grad, overridden
from billhook.model import text_config
from billhook.progress import OnProgress

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
    """Returns the tokens of a prompt: the text, or a chat that asks to continue it."""
    if not tokenizer.chat_template:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    chat = [{"role": "user", "content": CONTINUE.format(text)}]
    encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


class _Temperatures(LogitsProcessor):
    """Divides each text's logits by its temperature; at 0, only the most likely token remains.

    As one batch writes at all temperatures, the weights are read once per token. `step` is called with each token's number.
    """

    def __init__(self, temperatures: Tensor, step: Callable[[int], None]) -> None:
        self._sampled = (temperatures > 0).nonzero()[:, 0]
        self._temperatures, self._step, self._tokens = temperatures[self._sampled, None], step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._tokens += 1
        self._step(self._tokens)
        chosen = torch.full_like(scores, -torch.inf).scatter_(1, scores.argmax(1, keepdim=True), 0.0)
        return chosen.index_copy_(0, self._sampled, scores[self._sampled] / self._temperatures)


def write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    step: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Continues prompts by `NEW_TOKENS` tokens, or until the model ends the text.

    Args:
        model: A causal language model.
        prompts: Tokens of each prompt.
        temperatures: Sampling temperatures; 0 takes the most likely token.
        seed: Sampling seed. The random state is as before afterward.
        step: Callback with the number of new tokens of each text so far.

    Returns:
        The new tokens, int64, `[temperatures, prompts, NEW_TOKENS]`, on the CPU; `ENDED` from the end token on.
    """
    heats = torch.tensor(temperatures, device=model.device).repeat_interleave(len(prompts))
    prompts = [*prompts] * len(temperatures)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = text_config(model.config).eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(**sampling, max_new_tokens=NEW_TOKENS, eos_token_id=ends or None, pad_token_id=0, use_cache=True)  # type: ignore[no-untyped-call]
    processors = LogitsProcessorList([_Temperatures(heats, step)])
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating_without_grad(model), torch.random.fork_rng(devices), overridden(model, generation_config=settings):
        torch.manual_seed(seed)
        rows: Tensor = model.generate(ids, attention_mask=mask, generation_config=settings, logits_processor=processors)  # type: ignore[operator]
    written = torch.full((len(prompts), NEW_TOKENS), ENDED)
    written[:, : rows.shape[1] - longest] = rows[:, longest:].cpu()
    ended = torch.isin(written, torch.tensor(ends or [ENDED])).cumsum(1) > 0
    return written.masked_fill(ended, ENDED).view(len(temperatures), -1, NEW_TOKENS)


@dataclass(frozen=True)
class Writing:
    """Statistics of texts that a model has written.

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

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, with the number of texts and the share that loops."""
        return {"texts": len(self.loops), "loop_share": sum(self.loops) / len(self.loops), **asdict(self)}


class Written(NamedTuple):
    """Texts of the dense and of a changed model at a temperature."""

    temperature: float
    before: Writing
    after: Writing

    def new_loops(self) -> tuple[float, float]:
        """Returns the share of texts that loop where the dense model's do not, with its error.

        The error is of Agresti and Coull's estimate, which is not 0 if no text loops.
        """
        texts = len(self.after.loops)
        count = sum(now and not then for now, then in zip(self.after.loops, self.before.loops, strict=True))
        share = (count + 2) / (texts + 4)
        return count / texts, math.sqrt(share * (1 - share) / (texts + 4))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"temperature": self.temperature, "before": self.before.to_json(), "after": self.after.to_json()}


class DenseWriting:
    """Stored texts of a dense language model after prompts, for comparing changed models.

    The prompts are the first 32 tokens of the first examples of each source.

    Args:
        model: The dense model.
        rows: Examples, each with the name of its source.
        prompts: Number of prompts of each source.
        tokenizer: The model's tokenizer.
        seed: Sampling seed.
        comm: Ranks, each of which writes a share of the texts.
        progress: Callback with the number of finished texts and the total.
        stored: What `tensors` of an equal object has returned; the model then writes nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Iterable[tuple[str, Tensor]],
        prompts: int,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        comm: Comm = SINGLE_PROCESS,
        progress: OnProgress | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._tokenizer, self._seed, self._comm = tokenizer, seed, comm
        self.prompts, counts = list[str](), Counter[str]()
        for source, ids in rows:
            counts[source] += 1
            if counts[source] <= prompts:
                self.prompts.append(str(tokenizer.decode(ids[:PROMPT_TOKENS].tolist(), skip_special_tokens=True)))
        if stored:
            self._texts = stored["written"]
        else:
            self._texts = self._write(model, tokenizer, progress)

    def _write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: OnProgress | None) -> Tensor:
        """Returns the new tokens of all texts, `[temperatures, prompts, tokens]`."""
        share = range(self._comm.rank, len(self.prompts), self._comm.size)
        texts = len(TEMPERATURES) * len(self.prompts)
        written = torch.zeros(len(TEMPERATURES), len(self.prompts), NEW_TOKENS, dtype=torch.int64)

        def report(done: int) -> None:
            if progress is not None:
                progress(done, texts)

        if share:
            ids = [prompt_ids(self.prompts[number], tokenizer) for number in share]
            step = lambda tokens: report(tokens * (texts - 1) // NEW_TOKENS)  # noqa: E731 - the last one ends when all do
            written[:, list(share)] = write(model, ids, seed=self._seed, step=step)
        report(texts)
        return self._comm(written)

    def compare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, progress: OnProgress | None = None
    ) -> list[Written]:
        """Lets a changed model continue the prompts, with its tokenizer if it has another."""
        after = self._write(model, tokenizer or self._tokenizer, progress)
        return [
            Written(temperature, Writing.of(before), Writing.of(now))
            for temperature, before, now in zip(TEMPERATURES, self._texts, after, strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the new tokens of the dense model, to be stored."""
        return {"written": self._texts}

    def state_dict(self) -> dict[str, Any]:
        """Returns the prompts, and the new tokens of the dense model."""
        return {"prompts": self.prompts, "texts": self._texts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the prompts and texts of an earlier process."""
        self.prompts, self._texts = state["prompts"], state["texts"]


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
