"""Multiple-choice questions, and the likelihood of each choice under a language model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEGAL = 'a line is {"context": text, "choices": [text, text, ...], "label": which choice is right, from 0}, and no text is blank'


@dataclass(frozen=True)
class Question:
    """A question: its line in a file, from 1, and its possible continuations, after a space; `label` is the right one, from 0."""

    file: str
    line: int
    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class EncodedChoice:
    """A question with one of its choices, as tokens, the last `scored` of them the choice's; `cut` if the beginning is lost."""

    ids: tuple[int, ...]
    scored: int
    cut: bool


def read_questions(file: str, limit: int | None = None, argument: str = "questions") -> list[Question]:
    """Reads the first `limit` questions from JSON Lines, such as `{"context": "...?", "choices": ["one", "two"], "label": 1}`.

    A refusal names the argument that gave the file.
    """
    path, questions = Path(file), list[Question]()
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file '{file}'")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip() and (limit is None or len(questions) < limit):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{argument}: {file}, line {number} is not JSON ({error}); {LEGAL}") from error
            questions.append(_question(row, file, number, argument))
    if not questions:
        raise ValueError(f"{argument}: {file} holds no question; {LEGAL}")
    return questions


def _question(row: object, file: str, number: int, argument: str) -> Question:
    match row:
        case {"context": str(context), "choices": [_, _, *_] as choices, "label": int(label)} if (
            type(label) is int
            and 0 <= label < len(choices)
            and all(isinstance(text, str) and text.strip() for text in (context, *choices))
        ):
            return Question(file, number, context, tuple(choices), label)
    raise ValueError(f"{argument}: {file}, line {number} is {str(row)[:120]}; {LEGAL}")


def encode(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, length: int, argument: str = "questions"
) -> list[list[EncodedChoice]]:
    """Encodes each question as rows, one for each choice.

    Context, space and choice are encoded as one text, as in lm-eval, because in most vocabularies a space belongs to the token
    after it; spaces at the end of the context count as the choice's. All tokens from the first difference to the context alone
    are the choice's, also one that joins the end of the context with the choice. A token for the beginning stands in front if the
    tokenizer puts one there. Contexts longer than `length` lose their beginning; the last token is scored, but never read.
    """
    start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[:1] == start else start + ids

    encoded = []
    for question in questions:
        context = question.context.rstrip()
        gap, before, rows = question.context[len(context) :] + " ", ids_of(context), list[EncodedChoice]()
        for number, choice in enumerate(question.choices):
            ids = ids_of(context + gap + choice)
            shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
            scored = len(ids) - shared
            if not shared or not 0 < scored <= length:
                raise ValueError(
                    f"{argument}: {question.file}, line {question.line}: choice {number} has {scored} tokens after {shared} of "
                    f"the context; it must have 1 to length={length}, after one at least"
                )
            rows.append(EncodedChoice(tuple(ids[-length - 1 :]), scored, len(ids) > length + 1))
        encoded.append(rows)
    return encoded


def batches(rows: Sequence[EncodedChoice], batch_size: int) -> list[list[EncodedChoice]]:
    """Groups rows into batches, the longest first and equal ones once, so that equal rows have exactly the same likelihood."""
    distinct = sorted(dict.fromkeys(rows), key=lambda row: -len(row.ids))
    return [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: Sequence[EncodedChoice]) -> list[float]:
    """Sums the log-probabilities of each row's scored tokens, in nats.

    Rows are padded on the right and the padding is masked, so that positions begin with 0 in every model, and no token that
    counts sees the padding.
    """
    read = [torch.tensor(row.ids[:-1]) for row in batch]
    ids, mask = pad_sequence(read, batch_first=True), pad_sequence([torch.ones_like(tokens) for tokens in read], batch_first=True)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return [_sum(of_row[: len(row.ids) - 1], row) for of_row, row in zip(logits, batch, strict=True)]


def _sum(logits: Tensor, row: EncodedChoice) -> float:
    chances = logits[-row.scored :].log_softmax(-1, dtype=torch.float32)
    tokens = torch.tensor(row.ids[-row.scored :], device=logits.device)
    return float(chances.gather(-1, tokens[:, None]).cpu().double().sum())
