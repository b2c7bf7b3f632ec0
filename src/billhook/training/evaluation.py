"""Evaluation of language models: perplexity, and accuracy on multiple-choice tasks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import RenderableType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_int, check_types
from billhook.assets import text_files
from billhook.calibration.reading import Rows
from billhook.display import Printable, text_table
from billhook.engine import cpu_by_default, evaluating_without_grad
from billhook.model import text_config, tokenizer_of
from billhook.progress import OnProgress
from billhook.report.choices import EncodedChoice, Question, batches, encode, log_likelihoods, read_questions
from billhook.report.degradation import perplexity
from billhook.report.generation import generates
from billhook.training.data import TextDataModule

LONGEST = 2048  # default length of a sequence, in tokens
Asked = list[tuple[Question, list[EncodedChoice]]]  # questions of a file, with their tokenized choices
Answers = Sequence[tuple[Question, Sequence[float]]]  # questions of a file, with the log-likelihoods of their choices


@dataclass(frozen=True)
class Figure:
    """A result of a model on a text or task, with 1 (right) or 0 for `each` question."""

    of: str
    measure: str
    value: float
    error: float | None = None
    each: tuple[int, ...] | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Printable):
    """Results of `evaluate`.

    Attributes:
        figures: `acc` and `acc_norm` of each question file, with standard errors, and the perplexity of the text.
    """

    figures: tuple[Figure, ...]

    def _renderables(self) -> list[RenderableType]:
        rows = [[figure.of, figure.measure, shown(figure.value, figure.error)] for figure in self.figures]
        return [text_table(rows, ["", "", "value"], aligns="<<>")]

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the text, or None without a text."""
        return next((figure.value for figure in self.figures if figure.measure == "perplexity"), None)

    @property
    def accuracy(self) -> dict[str, float]:
        """Fraction of right answers (`acc`) by question file, with the names in `figures`."""
        return {figure.of: figure.value for figure in self.figures if figure.measure == "acc"}


@cpu_by_default()
def evaluate(
    model: PreTrainedModel,
    text: str | None = None,
    questions: Sequence[str] = (),
    tokenizer: str | None = None,
    length: int | None = None,
    examples: int = 64,
    limit: int | None = None,
    batch_size: int = 8,
    column: str = "text",
) -> Evaluation:
    """Measures perplexity on a text, and zero-shot accuracy on multiple-choice questions.

    `billhook evaluate` measures the same for several folders, and also runs lm-eval tasks. An answer is the choice with the
    highest log-likelihood (acc), or the highest log-likelihood per character (acc_norm), as in lm-eval.

    Args:
        model: A causal language model, which is not changed.
        text: A file (.txt, .jsonl, .csv, .parquet), or `"tiny"` or `"mixed"` (packaged texts). It is split into blocks.
        questions: Question files in JSON Lines: `{"context": "Question: ...", "choices": ["one", "two"], "label": 1}`.
        tokenizer: Name or folder of a tokenizer. Defaults to the model's.
        length: Length of a block in tokens. Defaults to 2048, or the model's context length if that is shorter.
        examples: Number of blocks of the text, from its start.
        limit: Number of questions per file, from its start. Defaults to all.
        batch_size: Number of choices per batch.
        column: Column of the text.

    Raises:
        ValueError: If an argument is illegal, the model is not a causal language model, or its logits are not finite.

    >>> import billhook as bh
    >>> from billhook.assets import text_files
    >>> found = bh.evaluate(bh.load("tiny", dtype="float32"), text_files()["validation"], length=128, examples=4)
    >>> 20 < found.perplexity < 80
    True
    """
    check_types(evaluate, locals())
    for name, value in {"examples": examples, "batch_size": batch_size, "limit": 1 if limit is None else limit}.items():
        check_int(name, value)
    check_int("length", 2 if length is None else length, 2)
    if text is None and not questions:
        raise ValueError("text=None requires questions. Pass a text, questions, or both.")
    if not generates(model):
        raise ValueError(f"model: {type(model).__name__} is not a causal language model. Pass one, such as LlamaForCausalLM.")
    most = getattr(text_config(model.config), "max_position_embeddings", None) or length or LONGEST
    if length is not None and length > most:
        raise ValueError(f"length={length} must be in 2..{most}, the context length of the model")
    tokens, encoder = length or min(LONGEST, most), tokenizer_of(model, tokenizer)
    sets = encoded([read_questions(file, limit) for file in questions], encoder, tokens)
    rows = None if text is None else blocks(text, tokenizer or str(model.config.name_or_path), tokens, column)
    with evaluating_without_grad(model):
        answers = score_choices(model, f"model: this {type(model).__name__}", sets, batch_size)
        return Evaluation((*on_questions(answers), *on_text(model, rows, tokens, examples)))


def encoded(
    questions: Iterable[list[Question]], tokenizer: PreTrainedTokenizerBase, length: int, argument: str = "questions"
) -> dict[str, Asked]:
    """Tokenizes questions, by file.

    Args:
        questions: Questions of each file.
        tokenizer: The tokenizer.
        length: Maximum number of tokens.
        argument: Argument that errors name.
    """
    return {file[0].file: list(zip(file, encode(file, tokenizer, length, argument), strict=True)) for file in questions}


def blocks(text: str, tokenizer: str, length: int, column: str) -> Rows:
    """Splits a text into blocks of `length` tokens.

    Args:
        text: File, folder, or Hub name.
        tokenizer: Name of the tokenizer.
        length: Number of tokens.
        column: Column of the text.
    """
    file = text_files(text).get("validation", text)
    data = TextDataModule({"test": file}, tokenizer, length=length, column=column, loss_on="all")
    data.setup("test")
    return data.splits["test"]


def score_choices(
    model: PreTrainedModel, who: str, sets: dict[str, Asked], batch_size: int, progress: OnProgress | None = None
) -> dict[str, Answers]:
    """Returns the log-likelihoods of all choices, by file.

    Args:
        model: The model.
        who: Its name in errors.
        sets: Questions by file.
        batch_size: Number of choices in a batch.
        progress: Callback with the number of tokens and the total.

    Raises:
        ValueError: If logits are not finite.
    """
    rows = []
    for _, choices in chain.from_iterable(sets.values()):
        rows += choices
    parts = batches(rows, batch_size)
    tokens = [sum(len(row.ids) for row in part) for part in parts]  # the first batches are the longest
    likelihoods = dict[EncodedChoice, float]()
    for number, batch in enumerate(parts, 1):
        likelihoods |= zip(batch, log_likelihoods(model, batch), strict=True)
        if progress is not None:
            progress(sum(tokens[:number]), sum(tokens))
    if not all(map(math.isfinite, likelihoods.values())):
        raise ValueError(f"{who} has logits that are not finite, because its weights have diverged")
    answers = dict[str, Answers]()
    for file, questions in sets.items():
        answers[file] = [(question, [likelihoods[row] for row in choices]) for question, choices in questions]
    return answers


def on_text(
    model: PreTrainedModel, text: Rows | None, length: int, examples: int, progress: OnProgress | None = None
) -> list[Figure]:
    """Measures perplexity on the first blocks of a text, if any.

    Args:
        model: The model.
        text: Blocks of text, if any.
        length: Number of tokens of a block.
        examples: Number of blocks.
        progress: Callback with the number of finished blocks and the total.
    """
    value = None if text is None else perplexity(model, text, examples, progress)
    if text is None or value is None:
        return []
    return [Figure(f"text ({min(examples, len(text))} x {length})", "perplexity", value)]


def on_questions(answers: Mapping[str, Answers]) -> list[Figure]:
    """Returns `acc` and `acc_norm` of each file's answers."""
    figures = []
    for file, answers_in_file in answers.items():
        figures += accuracies(f"{Path(file).stem} ({len(answers_in_file)})", answers_in_file)
    return figures


def accuracies(of: str, answers: Answers) -> list[Figure]:
    """Returns `acc` and `acc_norm` from the log-likelihoods of all choices."""
    plain, norm = list[int](), list[int]()
    for question, sums in answers:
        per_character = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        for right, scores in ((plain, sums), (norm, per_character)):
            right.append(int(max(range(len(scores)), key=scores.__getitem__) == question.label))
    return [Figure(of, name, *mean(each), tuple(each)) for name, each in (("acc", plain), ("acc_norm", norm))]


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, s / sqrt(n), which is None for a single value."""
    count, average = len(values), sum(values) / len(values)
    if count == 1:
        return average, None
    return average, math.sqrt(sum((value - average) ** 2 for value in values) / (count - 1) / count)


def shown(value: float, error: float | None, sign: str = "") -> str:
    """Formats a value with its standard error, if any."""
    return f"{value:{sign},.3f}" + ("" if error is None else f" ± {error:.3f}")
