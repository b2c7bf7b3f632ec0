"""Multiple-choice questions and the likelihood of each choice."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.model import check_ids

LEGAL = 'a line is {"context": text, "choices": [text, text, ...], "label": index of the correct choice}, and no text is blank'


@dataclass(frozen=True)
class Question:
    """A question with its choices; `label` is the index of the correct choice."""

    file: str
    line: int
    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class EncodedChoice:
    """Tokens of a question and a choice: `scored` at the end; `cut` if truncated."""

    ids: tuple[int, ...]
    scored: int
    cut: bool


def read_questions(file: str, limit: int | None = None, argument: str = "questions") -> list[Question]:
    """Reads the first `limit` questions from a JSON Lines file; errors name `argument`.

    A line is, for example, `{"context": "...?", "choices": ["one", "two"], "label": 1}`.

    Raises:
        ValueError: If the file does not exist, has no questions, or has a line in another form.
    """
    path = Path(file)
    questions = list[Question]()
    if not path.is_file():
        raise ValueError(f"{argument}: the file '{file}' does not exist.")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip() and (limit is None or len(questions) < limit):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{argument}: {file}, line {number} is not JSON ({error}); {LEGAL}") from error
            match row:
                case {"context": str(context), "choices": [_, _, *_] as choices, "label": int(label)} if (
                    type(label) is int
                    and 0 <= label < len(choices)
                    and all(isinstance(text, str) and text.strip() for text in (context, *choices))
                ):
                    questions.append(Question(file, number, context, tuple(choices), label))
                case _:
                    raise ValueError(f"{argument}: {file}, line {number} is {str(row)[:120]}; {LEGAL}")
    if not questions:
        raise ValueError(f"{argument}: {file} has no questions; {LEGAL}")
    return questions


def encode(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, length: int, argument: str = "questions"
) -> list[list[EncodedChoice]]:
    """Encodes each question with each of its choices.

    Context, space, and choice are encoded as one text, as in lm-eval, because most vocabularies attach a space to the next token.
    Trailing spaces of the context count as part of the choice. All tokens from the first difference to the encoded context on
    are scored, including a token that joins context and choice. A beginning-of-text token is added if the tokenizer adds one.
    Contexts longer than `length` are truncated at the start. The last token is scored but not an input.

    Args:
        questions: The questions.
        tokenizer: The tokenizer.
        length: Maximum number of tokens that are inputs.
        argument: Argument that errors name.

    Raises:
        ValueError: If a choice is empty or too long.
    """
    start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[:1] == start else start + ids

    encoded = []
    for question in questions:
        context = question.context.rstrip()
        gap = question.context[len(context) :] + " "
        before = ids_of(context)
        rows = []
        for number, choice in enumerate(question.choices):
            ids = ids_of(context + gap + choice)
            shared = len(commonprefix([before, ids]))
            scored = len(ids) - shared
            if not shared or not 0 < scored <= length:
                raise ValueError(
                    f"{argument}: {question.file}, line {question.line}: choice {number} has {scored} tokens after {shared} "
                    f"context tokens. It must have 1 to length={length} tokens after at least 1 context token."
                )
            rows.append(EncodedChoice(tuple(ids[-length - 1 :]), scored, len(ids) > length + 1))
        encoded.append(rows)
    return encoded


def batches(rows: Sequence[EncodedChoice], batch_size: int) -> list[list[EncodedChoice]]:
    """Groups distinct rows into batches, longest first."""
    distinct = sorted(dict.fromkeys(rows), key=lambda row: -len(row.ids))
    return [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, batch: Sequence[EncodedChoice]) -> list[float]:
    """Returns the sum of the log-probabilities of each row's scored tokens, in nats.

    Rows are padded on the right and the padding is masked, so that positions start at 0 in every model and scored tokens do not
    attend to padding.
    """
    inputs = [torch.tensor(row.ids[:-1]) for row in batch]
    ids = pad_sequence(inputs, batch_first=True)
    mask = pad_sequence(list(map(torch.ones_like, inputs)), batch_first=True)
    check_ids(model, ids)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    sums = []
    for of_row, row in zip(logits, batch, strict=True):
        log_probs = of_row[: len(row.ids) - 1][-row.scored :].log_softmax(-1, dtype=torch.float32)
        tokens = torch.tensor(row.ids[-row.scored :], device=logits.device)
        sums.append(float(log_probs.gather(-1, tokens[:, None]).cpu().double().sum()))
    return sums
