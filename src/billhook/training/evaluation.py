"""Measures a language model as it stands: perplexity on a text, and accuracy on multiple-choice questions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_int, check_types
from billhook.assets import text_files
from billhook.calibration.reading import Rows
from billhook.display import Printable, text_table
from billhook.engine.state import evaluating_without_grad
from billhook.model.config_fields import text_config
from billhook.model.preprocessors import tokenizer_of
from billhook.progress import OnProgress
from billhook.report.choices import EncodedChoice, Question, batches, encode, log_likelihoods, read_questions
from billhook.report.degradation import perplexity
from billhook.report.generation import generates
from billhook.training.data import TextDataModule

LONGEST = 2048
"""Tokens that models read at once, unless another length is asked for."""
Asked = list[tuple[Question, list[EncodedChoice]]]
"""The questions of a file, each with its choices as tokens."""
Answers = Sequence[tuple[Question, Sequence[float]]]
"""The questions of a file, each with the log-likelihoods of its choices."""


@dataclass(frozen=True)
class Figure:
    """A figure of one model `of` questions, a text or a task; `each` is 1 or 0, whether each question was answered right."""

    of: str
    measure: str
    value: float
    error: float | None = None
    each: tuple[int, ...] | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Printable):
    """Figures that `evaluate` has measured.

    Attributes:
        figures: Of each file of questions `acc` and `acc_norm`, with binomial standard errors; of a text its perplexity.
    """

    figures: tuple[Figure, ...]

    def _renderables(self) -> list[RenderableType]:
        rows = [[figure.of, figure.measure, shown(figure.value, figure.error)] for figure in self.figures]
        return [text_table(rows, ["", "", "value"], aligns="<<>")]

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the text, if there was one."""
        return next((figure.value for figure in self.figures if figure.measure == "perplexity"), None)

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right answers (`acc`) by file of questions, as each is called in `figures`."""
        return {figure.of: figure.value for figure in self.figures if figure.measure == "acc"}


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
    """Measures a causal language model in memory: perplexity on a text, zero-shot accuracy on multiple-choice questions.

    `billhook evaluate` measures the same of folders, side by side, with lm-eval's tasks beside it. An answer is the choice with
    the highest log-likelihood (acc), or the highest one per character (acc_norm), as in lm-eval.

    Args:
        model: The model; it is left as it was.
        text: A file (.txt, .jsonl, .csv, .parquet), or "tiny" (the embedded text), cut into blocks.
        questions: Files of questions, JSON Lines: `{"context": "Question: ...", "choices": ["one", "two"], "label": 1}`.
        tokenizer: A name or folder; by default where the model came from.
        length: Tokens that the model reads at once; by default 2048, or as many as it reads.
        examples: Blocks of the text, the first ones.
        limit: Questions of each file, the first ones; by default all.
        batch_size: Choices in a batch.
        column: The column that holds the text.

    Raises:
        ValueError: If an argument is not legal, the model predicts no next token, or it computes no finite number.

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
        raise ValueError("text=None: give a text to measure perplexity on, questions, or both")
    if not generates(model):
        raise ValueError(f"model: a {type(model).__name__} predicts no next token; a causal language model is needed")
    most = getattr(text_config(model.config), "max_position_embeddings", None) or length or LONGEST
    if length is not None and length > most:
        raise ValueError(f"length={length} must be in 2..{most}: the model reads no more tokens at once")
    tokens, encoder = length or min(LONGEST, most), tokenizer_of(model, tokenizer)
    sets = encoded([read_questions(file, limit) for file in questions], encoder, tokens)
    rows = None if text is None else blocks(text, tokenizer or str(model.config.name_or_path), tokens, column)
    with evaluating_without_grad(model):
        answers = answered(model, f"model: this {type(model).__name__}", sets, batch_size)
        return Evaluation((*on_questions(answers), *on_text(model, rows, tokens, examples)))


def encoded(
    questions: Iterable[list[Question]], tokenizer: PreTrainedTokenizerBase, length: int, argument: str = "questions"
) -> dict[str, Asked]:
    """Encodes questions, by file; a refusal names the argument that gave them."""
    return {file[0].file: list(zip(file, encode(file, tokenizer, length, argument), strict=True)) for file in questions}


def blocks(text: str, tokenizer: str, length: int, column: str) -> Rows:
    """Cuts a text into blocks of so many tokens."""
    file = text_files()["validation"] if text == "tiny" else text
    data = TextDataModule({"test": file}, tokenizer, block_size=length, column=column, loss_on="all")
    data.setup("test")
    return data.splits["test"]


def answered(
    model: PreTrainedModel, who: str, sets: dict[str, Asked], batch_size: int, progress: OnProgress | None = None
) -> dict[str, Answers]:
    """Measures the log-likelihoods of all choices, by file; `progress` is called with how many tokens of how many are read."""
    rows = [row for questions in sets.values() for _, choices in questions for row in choices]
    parts = batches(rows, batch_size)
    tokens = [sum(len(row.ids) for row in batch) for batch in parts]  # the first batches are the longest
    likelihoods = dict[EncodedChoice, float]()
    for number, batch in enumerate(parts, 1):
        likelihoods |= zip(batch, log_likelihoods(model, batch), strict=True)
        if progress is not None:
            progress(sum(tokens[:number]), sum(tokens))
    if not all(math.isfinite(value) for value in likelihoods.values()):
        raise ValueError(f"{who} computes logits that are not finite; its weights have diverged")
    answers = dict[str, Answers]()
    for file, questions in sets.items():
        answers[file] = [(question, [likelihoods[row] for row in choices]) for question, choices in questions]
    return answers


def on_text(
    model: PreTrainedModel, text: Rows | None, length: int, examples: int, progress: OnProgress | None = None
) -> list[Figure]:
    """Measures perplexity on the first blocks of a text, if there is one."""
    value = None if text is None else perplexity(model, text, examples, progress)
    if text is None or value is None:
        return []
    return [Figure(f"text ({min(examples, len(text))} x {length})", "perplexity", value)]


def on_questions(answers: Mapping[str, Answers]) -> list[Figure]:
    """Measures `acc` and `acc_norm` of each file's answers."""
    figures = list[Figure]()
    for file, answers_in_file in answers.items():
        figures += accuracies(f"{Path(file).stem} ({len(answers_in_file)})", answers_in_file)
    return figures


def accuracies(of: str, answers: Answers) -> list[Figure]:
    """Measures `acc` and `acc_norm` on questions with the log-likelihood of each of their choices."""
    plain, norm = list[int](), list[int]()
    for question, sums in answers:
        per_character = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        for right, scores in ((plain, sums), (norm, per_character)):
            right.append(int(max(range(len(scores)), key=scores.__getitem__) == question.label))
    return [Figure(of, name, *mean(each), tuple(each)) for name, each in (("acc", plain), ("acc_norm", norm))]


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, s / sqrt(n); None for the error of a single value."""
    count, middle = len(values), sum(values) / len(values)
    return middle, math.sqrt(sum((value - middle) ** 2 for value in values) / (count - 1) / count) if count > 1 else None


def shown(value: float, error: float | None, sign: str = "") -> str:
    """Writes a figure with its standard error, if it has one."""
    return f"{value:{sign},.3f}" + ("" if error is None else f" ± {error:.3f}")
