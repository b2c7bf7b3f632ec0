"""Self-generated calibration text: sampled from the model, so no file is needed.

Calibrating on prompts and the model's own answers: "Reasoning Models Can be Accurately Pruned Via Chain-of-Thought
Reconstruction" (Lucas, Behdin, Wang, Song, Tang & Mazumder, 2025, https://arxiv.org/abs/2509.12464). Without prompts:
"Self-calibration for Language Model Quantization and Pruning" (Williams, Chrysostomou & Aletras, 2024,
https://arxiv.org/abs/2410.17170).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from billhook.arguments import check_int, check_number, check_types
from billhook.engine import (
    Batch,
    cpu_by_default,
    evaluating_without_grad,
    fingerprint,
    identity_of,
    overridden,
    replace_file,
    seed_random_state,
    set_torch_state,
    torch_state,
)
from billhook.model import check_tokenizer, check_values, find_transformer, kv_cache_bytes, text_config, tokenizer_of
from billhook.progress import OnProgress, progress_bar

GENERATED = "generated"
"""Name of this source."""
DEFAULT_LENGTH = 512
"""Default number of tokens per example."""
AT_ONCE = 8
"""Fewest examples that are generated in parallel; more if their KV caches fit into `CACHES`."""
CACHES = 2**30
"""Bytes for KV caches."""
KEPT = ".billhook.safetensors"
"""End of the name of a file with finished examples."""
SKIPPED = 8
"""Examples start within the first eighth of their length."""


@cpu_by_default()
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
    folder: Path | None = None,
) -> list[Batch]:
    """Samples calibration text from a causal language model, without padding.

    Examples start with prompts. Without prompts, the model starts texts, and each example begins at a random token in the first
    eighth of its length, because attention concentrates on the first token of an example, which must not always be the same.
    Generation continues past end tokens until the example is full.

    Args:
        model: A Hugging Face causal language model, or a module that holds one.
        prompts: Texts, or chats (lists of messages with `role` and `content`), used in rotation as the starts of examples. Chats
            go through the chat template. Defaults to None (no prompts).
        examples: Number of examples.
        length: Tokens per example, including the prompt; longer prompts are cut. Defaults to the context length of the model, at
            most 512.
        temperature: Sampling temperature. 1 samples from the model's own distribution.
        batch_size: Examples per batch.
        seed: Sampling seed.
        tokenizer: Tokenizer for prompts, its name, or its folder. Defaults to the one in the folder of the model.
        folder: Folder for the finished examples, from which the same call continues if it is interrupted. Defaults to None.

    Returns:
        Batches `{"input_ids": [batch_size, length]}`, int64, on the CPU.

    Raises:
        ValueError: If the model is not a causal language model, its context is shorter than `length`, it has no start token and
            there are no prompts, or a prompt is neither text nor a chat.

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
    skipped = 0
    starts = []
    if prompts is None:  # extra tokens, of which the last is never an input
        most = getattr(text_config(subject.config), "max_position_embeddings", None)
        skipped = max(1, length // SKIPPED)
        skipped = min(skipped, most + 1 - length) if most else skipped
        starts.append(_start(subject))
    else:
        encoder: Any = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer_of(subject, tokenizer)
        check_tokenizer(subject, encoder)
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = encoder(prompt)["input_ids"]
            elif isinstance(prompt, Sequence) and all(isinstance(message, dict) for message in prompt):
                ids = encoder.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
            else:
                raise ValueError(f"prompts: {prompt!r} must be text or a chat (a list of messages with role and content).")
            starts.append((ids or _start(subject))[: length - 1])  # less than an example
        if not starts:
            raise ValueError("prompts is empty. Pass at least one prompt, or None.")
    begun = [starts[row % len(starts)] for row in range(examples)]
    rows = _written(subject, begun, length + skipped, temperature, seed, folder)
    if skipped:  # tokens at both ends of each row are left out, one of the first at least
        first = torch.randint(1, skipped + 1, (len(rows), 1), generator=torch.Generator().manual_seed(seed))
        rows = rows.gather(1, first + torch.arange(length))
    return [Batch({"input_ids": ids}, GENERATED) for ids in torch.split(rows, batch_size)]


def can_generate(model: PreTrainedModel) -> bool:
    """Returns True for a causal language model, which generates text."""
    return bool(model.can_generate() and not model.config.is_encoder_decoder and model.main_input_name == "input_ids")


def check_can_generate(model: PreTrainedModel) -> None:
    """Raises if a model does not generate text."""
    if not can_generate(model):
        raise ValueError(f"{type(model).__name__} does not generate text to calibrate on")


def example_length(model: PreTrainedModel, length: int | None) -> int:
    """Returns the number of tokens per example: `length`, or the context length, at most 512.

    Raises:
        ValueError: If `length` exceeds the context length.
    """
    check_int("length", 2 if length is None else length, 2)
    most = getattr(text_config(model.config), "max_position_embeddings", None) or length or DEFAULT_LENGTH
    if length is not None and length > most:
        raise ValueError(f"length={length} exceeds the context length of the model, {most} tokens.")
    return length or min(DEFAULT_LENGTH, most)


def _start(model: PreTrainedModel) -> list[int]:
    """Returns the token that starts a text, or else the end token of the text before."""
    config = text_config(model.config)
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return [token[0] if isinstance(token, Sequence) else int(token)]
    raise ValueError(f"prompts=None: the config of {type(model).__name__} has no token to start a text with. Pass prompts.")


def _written(
    model: PreTrainedModel, starts: list[list[int]], length: int, temperature: float, seed: int, folder: Path | None
) -> Tensor:
    """Continues prompts to full examples; prompts of equal length run in parallel."""
    rows = torch.empty(len(starts), length, dtype=torch.int64)
    finished = 0
    # each step loads all weights, however many examples run in parallel
    at_once = max(AT_ONCE, CACHES // (length * (kv_cache_bytes(model) or CACHES)))
    by_length = defaultdict(list)
    for row, start in enumerate(starts):
        by_length[len(start)].append(row)
    groups = [alike[first : first + at_once] for alike in by_length.values() for first in range(0, len(alike), at_once)]
    with evaluating_without_grad(model):
        if not model(torch.tensor(starts[:1], device=model.device)).logits.isfinite().all():
            raise ValueError(f"model: {type(model).__name__} returns logits that are not finite, so it cannot generate text.")
        seed_random_state(seed, model.device)
        file = None
        if folder is not None:
            key = fingerprint(identity_of(model), starts, length, temperature, seed, str(model.device))
            file = folder / f"{key[:16]}{KEPT}"
            with suppress(OSError, SafetensorError, KeyError, RuntimeError):  # there is no file, or it is damaged
                state = load_file(file)
                kept = state.pop("rows")
                count = int(state.pop("finished"))
                set_torch_state(state, model.device)
                rows = kept
                finished = count
        with progress_bar("generating text", "tokens") as report:
            progress = _Progress(report, rows.numel() - sum(map(len, starts)))
            for number, group in enumerate(groups):
                progress.written -= sum(len(starts[row]) for row in group)
                if number >= finished:
                    ids = torch.tensor([starts[row] for row in group], device=model.device)
                    rows[group] = _continued(model, ids, length, temperature, progress).cpu()
                    if file is not None:  # finished rows, with the random state after them
                        file.parent.mkdir(parents=True, exist_ok=True)
                        draft = file.with_name(f"draft{KEPT}")
                        save_file({"rows": rows, "finished": torch.tensor(number + 1), **torch_state(model.device)}, draft)
                        replace_file(draft, file)
                progress.written += rows[group].numel()
    return rows


@dataclass
class _Progress(StoppingCriteria):
    """A stopping criterion that reports the number of generated tokens and never stops."""

    report: OnProgress
    total: int
    written: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.report(self.written + input_ids.numel(), self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _continued(model: PreTrainedModel, ids: Tensor, length: int, temperature: float, progress: _Progress) -> Tensor:
    """Samples from the model's distribution, scaled only by the temperature, past end tokens."""
    sampling = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_length=length, eos_token_id=None, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip
    generate: Any = model.generate
    with overridden(model, generation_config=sampling):  # the model's own config would fill in the fields that are unset here
        stopping = StoppingCriteriaList([progress])
        mask = torch.ones_like(ids)
        tokens: Tensor = generate(ids, attention_mask=mask, generation_config=sampling, stopping_criteria=stopping)
    return tokens
