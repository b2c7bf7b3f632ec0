"""Text that the model writes itself, to calibrate on: it covers what the model is for, and nobody has to give any.

"Reasoning Models Can be Accurately Pruned Via Chain-of-Thought Reconstruction" (Lucas, Behdin, Wang, Song, Tang & Mazumder,
2025, https://arxiv.org/abs/2509.12464) calibrates on prompts and the model's own answers; "Self-calibration for Language Model
Quantization and Pruning" (Williams, Chrysostomou & Aletras, 2024, https://arxiv.org/abs/2410.17170) on what it writes by itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from billhook.arguments import check_int, check_number, check_types
from billhook.engine.batches import Batch
from billhook.engine.state import evaluating_without_grad, overridden
from billhook.model.config_fields import text_config
from billhook.model.costs import kv_cache_bytes
from billhook.model.find import check_values, find_transformer
from billhook.model.preprocessors import tokenizer_of
from billhook.progress import OnProgress, progress_bar

GENERATED = "generated"
"""The name of this source."""
DEFAULT_LENGTH = 512
"""Tokens of a row, unless another length is asked for."""
AT_ONCE = 8
"""Rows that are written side by side at least; more, as long as their key/value caches fit into `CACHES`."""
CACHES = 2**30
"""Bytes."""
SKIPPED = 8
"""A row begins within the first eighth of its length."""


def generated(
    model: nn.Module,
    prompts: Iterable[Any] | None = None,
    *,
    examples: int = 40,
    length: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 1,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
) -> list[Batch]:
    """Lets a causal language model write the text that it is calibrated on, token by token, without padding.

    Rows begin with prompts. Without any, texts are begun, and rows begin anywhere in an eighth of their length after the first
    token, as attention rests on the first one of a row, which is not to be the same in all. Each goes on past the ends of texts
    until it is full.

    Args:
        model: A Hugging Face model that predicts the next token, or a module that holds one.
        prompts: Texts, or chats (lists of messages with `role` and `content`, which go through the chat template), each the
            beginning of a row; they are taken in turn. Without any, the model begins by itself.
        examples: Rows.
        length: Tokens of a row, its prompt included; longer prompts are cut. By default as many as the model reads, at most 512.
        temperature: Of the distribution that tokens are drawn from; 1 is the model's own.
        batch_size: Rows in a batch.
        seed: Of the draws.
        tokenizer: For prompts: a tokenizer, its name or its folder; by default that of the folder the model came from.

    Returns:
        Batches `{"input_ids": [batch_size, length]}`, int64, on the CPU.

    Raises:
        ValueError: If the model predicts no next token, reads fewer tokens, has no token that begins a text (and there are no
            prompts), or a prompt is neither text nor a chat.

    Example:
        >>> import billhook as bh
        >>> batches = bh.generated(bh.load("tiny"), examples=2, length=16)
        >>> [list(batch["input_ids"].shape) for batch in batches]
        [[1, 16], [1, 16]]
    """
    check_types(generated, locals())
    check_int("examples", examples)
    check_int("batch_size", batch_size)
    check_number("temperature", temperature, above=0)
    subject = find_transformer(model)
    check_values(subject)
    check_can_generate(subject)
    length = example_length(subject, length)
    starts = [_start(subject)] if prompts is None else _encoded(subject, prompts, tokenizer, length)
    skipped = 0 if prompts is not None else _skipped(subject, length)
    begun = [starts[row % len(starts)] for row in range(examples)]
    rows = _written(subject, begun, length + skipped, temperature, seed)
    if skipped:  # tokens at both ends of each row are left out, one of the first at least
        first = torch.randint(1, skipped + 1, (len(rows), 1), generator=torch.Generator().manual_seed(seed))
        rows = rows.gather(1, first + torch.arange(length))
    return [Batch({"input_ids": ids}, GENERATED) for ids in torch.split(rows, batch_size)]


def can_generate(model: PreTrainedModel) -> bool:
    """Tells whether a model writes text."""
    config: Any = model.config
    return bool(model.can_generate() and not config.is_encoder_decoder and model.main_input_name == "input_ids")


def check_can_generate(model: PreTrainedModel) -> None:
    """Refuses a model that does not write."""
    if not can_generate(model):
        raise ValueError(f"a {type(model).__name__} does not write text that it could be shown")


def example_length(model: PreTrainedModel, length: int | None) -> int:
    """Returns how many tokens a row has: those asked for, or as many as the model reads, at most 512."""
    check_int("length", 2 if length is None else length, 2)
    config: Any = model.config
    most = getattr(text_config(config), "max_position_embeddings", None) or length or DEFAULT_LENGTH
    if length is not None and length > most:
        raise ValueError(f"length={length}: the model reads no more than {most} tokens at once")
    return length or min(DEFAULT_LENGTH, most)


def _skipped(model: PreTrainedModel, length: int) -> int:
    """Returns how many tokens more than a row are written: the last of them is not read, and all others are."""
    most = getattr(text_config(model.config), "max_position_embeddings", None)
    skipped = max(1, length // SKIPPED)
    return min(skipped, most + 1 - length) if most else skipped


def _start(model: PreTrainedModel) -> list[int]:
    """Returns the token that begins a text: where there is none, the one that ends the text before."""
    config: Any = text_config(model.config)
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return [token[0] if isinstance(token, Sequence) else int(token)]
    raise ValueError(f"prompts=None: the config of {type(model).__name__} names no token that begins a text: give prompts")


def _encoded(
    model: PreTrainedModel, prompts: Iterable[Any], tokenizer: PreTrainedTokenizerBase | str | None, length: int
) -> list[list[int]]:
    """Turns prompts into token ids, none of them a whole row."""
    encoder: Any = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer_of(model, tokenizer)
    starts = list[list[int]]()
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = encoder(prompt)["input_ids"]
        elif isinstance(prompt, Sequence) and all(isinstance(message, dict) for message in prompt):
            ids = encoder.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            raise ValueError(f"prompts: {prompt!r} is neither text nor a chat, a list of messages with role and content")
        starts.append((ids or _start(model))[: length - 1])
    if not starts:
        raise ValueError("prompts: at least one is needed")
    return starts


def _written(model: PreTrainedModel, starts: list[list[int]], length: int, temperature: float, seed: int) -> Tensor:
    """Continues starts to full rows, `[rows, length]`; those of one length side by side."""
    rows = torch.empty(len(starts), length, dtype=torch.int64)
    # each step reads all weights, however many rows are written side by side
    at_once = max(AT_ONCE, CACHES // (length * (kv_cache_bytes(model) or CACHES)))
    by_length: dict[int, list[int]] = {}
    for row, start in enumerate(starts):
        by_length.setdefault(len(start), []).append(row)
    groups = [alike[first : first + at_once] for alike in by_length.values() for first in range(0, len(alike), at_once)]
    with evaluating_without_grad(model):
        if not model(torch.tensor(starts[:1], device=model.device)).logits.isfinite().all():
            raise ValueError(f"model: {type(model).__name__} computes numbers that are not finite, so it writes nothing")
        torch.manual_seed(seed)
        with progress_bar("writing text", "tokens") as report:
            progress = _Progress(report, rows.numel() - sum(map(len, starts)))
            for group in groups:
                ids = torch.tensor([starts[row] for row in group], device=model.device)
                progress.written -= ids.numel()
                rows[group] = _continued(model, ids, length, temperature, progress).cpu()
                progress.written += rows[group].numel()
    return rows


class _Progress(StoppingCriteria):
    """Reports after each token how many the model has written, and stops nothing."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self.report, self.total, self.written = report, total, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.report(self.written + input_ids.numel(), self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _continued(model: PreTrainedModel, ids: Tensor, length: int, temperature: float, progress: _Progress) -> Tensor:
    """Draws the next tokens, past the ends of texts; nothing but the temperature changes the model's distribution."""
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_length=length, eos_token_id=None, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip
    write: Any = model.generate
    with overridden(model, generation_config=how):  # which would add what `how` leaves open
        stopping = StoppingCriteriaList([progress])
        written: Tensor = write(ids, attention_mask=torch.ones_like(ids), generation_config=how, stopping_criteria=stopping)
    return written
