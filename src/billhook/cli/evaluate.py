"""`billhook evaluate`: checkpoints before and after, side by side: accuracy, perplexity, lm-eval's tasks."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from json import dumps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_int
from billhook.assets import model_path
from billhook.calibration.reading import Rows
from billhook.checkpoints.save import load
from billhook.cli import images
from billhook.cli.machine import check_file, device_of, file_progress, model_progress
from billhook.display import render_table
from billhook.model.config_fields import text_config
from billhook.model.meta import model_class, read_config
from billhook.model.preprocessors import load_tokenizer
from billhook.model.streamed import stream as open_streamed
from billhook.progress import progress_bar
from billhook.report.choices import Question, read_questions
from billhook.training.evaluation import (
    LONGEST,
    Asked,
    Figure,
    accuracies,
    answered,
    blocks,
    encoded,
    mean,
    on_questions,
    on_text,
    shown,
)
from billhook.versions import versions


@dataclass(frozen=True)
class _Work:
    """Everything to measure on one model, with its own tokenizer."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, Asked]
    text: Rows | None
    tasks: list[str]


def evaluate(
    models: list[str],
    data: list[str] | None = None,
    text: str | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    length: int | None = None,
    examples: int = 64,
    batch_size: int = 8,
    column: str = "text",
    label_column: str = "label",
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    json: str | None = None,
) -> None:
    """Measures language models, or classifiers of images, side by side: accuracy, perplexity, lm-eval's tasks.

    A language model answers multiple-choice questions zero-shot: by the choice with the highest log-likelihood (acc), or the
    highest one per character (acc_norm), both as in lm-eval; the first of equal ones counts. Standard errors are binomial,
    sqrt(p (1 - p) / (n - 1)). The difference between a later model and the first has the standard error of the differences
    question by question, as both answer the same questions: most often it is smaller than each model's own.

    A classifier of images has its accuracy (acc), of more than five classes also the share of images whose label is among the
    five likeliest (acc_top5), with the same standard errors; and, where there are several models, the share of images that each
    takes for what the first one does (agreement).

    Args:
        models: Folders, hub names or "tiny"; first the one to compare the others with: `evaluate before after ...`.
        data: Files of questions, JSON Lines: `{"context": "Question: ... Answer:", "choices": ["one", "two"], "label": 1}`. A
            choice follows the context and a space; its log-likelihood is the sum over its tokens (acc), for acc_norm divided by
            its characters, as in lm-eval. For classifiers of images, folders of these by class, .parquet files or hub names: they
            are measured on the split `test`, or else `validation`, or the one that there is.
        text: A file (.txt, .jsonl, .csv, .parquet) to measure perplexity on, or "tiny" (the embedded text). Perplexities of
            models with different tokenizers cannot be compared.
        tasks: Tasks of lm-eval by name, as in `--tasks hellaswag,arc_easy`; `pip install 'billhook[eval]'` installs it. Their
            differences have no standard errors.
        limit: Questions of each file, and of each task of lm-eval: the first ones; by default all. Of images so many drawn at
            random, always the same.
        length: Tokens that the models read at once: longer contexts lose their beginning, and the text is cut into blocks of so
            many. By default 2048, or as many as all of the models read.
        examples: Blocks of the text, the first ones.
        batch_size: Choices in a batch, or images.
        column: The column that holds the text; of images, by default "image".
        label_column: The column that holds the labels of images.
        dtype: Of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where it is computed: "auto" takes an accelerator if there is one with float64, which Apple's lack. Of a model
            that stays in its files, blocks compute there, one at a time; with "auto" on the CPU.
        stream: Whether models stay in their files, and one block at a time is in memory, for perplexity on `text`.
        json: A file, ending in .json, for the figures, the likelihood of each choice, the settings and the versions.

    Raises:
        ValueError: If an argument is not legal, before any model is loaded; or a model computes no finite number.
    """
    for name, value in {"limit": 1 if limit is None else limit, "examples": examples, "batch_size": batch_size}.items():
        check_int(name, value)
    check_file("json", json, ".json")
    if not models or not (data or text or tasks):
        raise ValueError("models and one of data, text and tasks are needed: what to measure, and on what")
    of_images, computes_on = any(images.classifies(model) for model in models), device_of(device)
    settings: dict[str, Any] = {"data": data, "limit": limit, "batch_size": batch_size, "column": column}
    if of_images:
        images.check(models, {"text": text, "tasks": tasks, "length": length, "stream": stream})
        settings |= {"column": images.COLUMN if column == "text" else column, "label_column": label_column}
        works = images.prepare(models, data or [], limit, batch_size, settings["column"], label_column)
    else:
        if stream and (data or tasks):
            raise ValueError("stream=True is for text alone: leave out data and tasks, or stream")
        if stream and device == "auto":
            computes_on = torch.device("cpu")
        tasks, length = _tasks(tasks or []), _length(models, length)
        settings |= {"text": text, "tasks": tasks, "length": length, "examples": examples}
        questions = [read_questions(file, limit, "data") for file in data or []]
        prepared = [_work(name, questions, text, column, length, tasks) for name in models]
        counts: dict[str, Any] = {"length": length, "examples": examples, "batch_size": batch_size, "limit": limit}
        works = [partial(_measure, work=work, **counts) for work in prepared]
    results = [_result(name, work, computes_on, dtype, stream) for name, work in zip(models, works, strict=True)]
    if of_images and len(models) > 1:
        for figures, about in results:
            figures += images.agreements(about["answers"], results[0][1]["answers"])
    print(table(models, [figures for figures, _ in results]))
    for name, (_, about) in zip(models, results, strict=True):
        if about.get("cut"):
            print(f"{name}: {about['cut']} choices had their context cut from the left, to length={settings['length']}")
    if json is not None:
        settings |= {"dtype": dtype, "device": str(computes_on)}
        of_models = [about | {"figures": _plain(figures, results[0][0])} for figures, about in results]
        used = versions("tokenizers", *(["lm_eval"] if settings.get("tasks") else []))
        record = {"versions": used, "settings": settings, "models": of_models}
        Path(json).write_text(dumps(record, indent=1, allow_nan=False) + "\n")


def _result(name: str, work: images.Work, device: torch.device, dtype: str, stream: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Loads and measures a model; returns its figures, and what is recorded about it."""
    began = time.perf_counter()
    with file_progress(f"loading {name}"):
        model = open_streamed(name, None, dtype, device) if stream else load(name, dtype)
    if not stream:
        model.to(device)  # type: ignore[arg-type]
    figures, about = work(model)
    return figures, {"model": name, "dtype": str(model.dtype), "seconds": time.perf_counter() - began} | about


def _length(models: Sequence[str], length: int | None) -> int:
    """Finds how many tokens all of the models read at once; refuses models that predict no next token."""
    longest = dict[str, int]()
    for name in models:
        path = model_path(name)
        config = read_config(path)
        kind = model_class(config, path).__name__
        if "CausalLM" not in kind and "LMHead" not in kind:
            raise ValueError(f"models: '{name}' is a {kind}, which predicts no next token; a causal language model is needed")
        longest[name] = getattr(text_config(config), "max_position_embeddings", None) or length or LONGEST
    most = min(longest, key=longest.__getitem__)
    if length is not None and not 2 <= length <= longest[most]:
        raise ValueError(f"length={length} must be in 2..{longest[most]}: '{most}' reads no more tokens at once")
    return length or min(LONGEST, longest[most])


def _work(name: str, questions: Sequence[list[Question]], text: str | None, column: str, length: int, tasks: list[str]) -> _Work:
    tokenizer = load_tokenizer(name)
    rows = None if text is None else blocks(text, model_path(name), length, column)
    return _Work(name, tokenizer, encoded(questions, tokenizer, length, "data"), rows, tasks)


def _measure(
    model: PreTrainedModel, work: _Work, length: int, examples: int, batch_size: int, limit: int | None
) -> tuple[list[Figure], dict[str, Any]]:
    """Measures all figures of a model; returns with them the likelihoods of each file's choices."""
    tasks = _harness(model, work, length, batch_size, limit) if work.tasks else []
    with progress_bar(f"{work.model}: questions", "tokens") as progress:
        scored = answered(model, f"models: '{work.model}'", work.sets, batch_size, progress)
    with model_progress(model, f"{work.model}: text", "blocks") as progress:
        figures = [*on_questions(scored), *on_text(model, work.text, length, examples, progress)]
    answers = dict[str, Any]()
    for file, likelihoods in scored.items():
        right, right_normed = (figure.each or () for figure in accuracies(file, likelihoods))
        answers[file] = [
            {"line": question.line, "label": question.label, "acc": plain, "acc_norm": norm, "log_likelihoods": sums}
            for (question, sums), plain, norm in zip(likelihoods, right, right_normed, strict=True)
        ]
    cut = sum(row.cut for asked in work.sets.values() for _, rows in asked for row in rows)
    return figures + tasks, {"cut": cut, "answers": answers}


def difference(figure: Figure, first: Figure) -> tuple[float, float | None]:
    """Returns the difference of a figure to the first model's, with the standard error of the differences by question."""
    if figure.each is None or first.each is None:
        return figure.value - first.value, None
    return mean([a - b for a, b in zip(figure.each, first.each, strict=True)])


def table(models: Sequence[str], figures: Sequence[Sequence[Figure]]) -> str:
    """Shows figures as rows and models as columns, with their differences to the first model."""
    rows = []
    for first, *others in zip(*figures, strict=True):
        cells = [f"{shown(other.value, other.error)}  ({shown(*difference(other, first), sign='+')})" for other in others]
        rows.append([first.of, first.measure, shown(first.value, first.error), *cells])
    legend = f"(difference to {models[0]}; ± standard error)" if len(models) > 1 else "(± standard error)"
    head = ["", "", *models]
    return f"{render_table(head, rows, aligns='<')}\n\n{legend}"


def _plain(figures: Sequence[Figure], first: Sequence[Figure]) -> list[dict[str, Any]]:
    """Turns figures into JSON, with their differences to the first model."""
    plain = []
    for figure, other in zip(figures, first, strict=True):
        numbers = {"value": figure.value, "error": figure.error}
        numbers |= zip(("difference", "difference_error"), difference(figure, other), strict=True)
        finite = {key: str(x) if x is not None and not math.isfinite(x) else x for key, x in numbers.items()}
        plain.append({"of": figure.of, "measure": figure.measure, **finite})
    return plain


def _tasks(tasks: Sequence[str]) -> list[str]:
    """Splits names of tasks at commas; refuses them if lm-eval is not installed."""
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if tasks and util.find_spec("lm_eval") is None:
        raise ValueError(f"tasks={','.join(tasks)} are lm-eval's, which is not installed: pip install 'billhook[eval]'")
    return names


def _harness(model: PreTrainedModel, work: _Work, length: int, batch_size: int, limit: int | None) -> list[Figure]:
    """Runs tasks of lm-eval, and returns each measure with the standard error that lm-eval states."""
    wrapper = import_module("lm_eval.models.huggingface").HFLM
    wrapped = wrapper(pretrained=model, tokenizer=work.tokenizer, batch_size=batch_size, max_length=length)
    results = import_module("lm_eval").simple_evaluate(model=wrapped, tasks=work.tasks, limit=limit, log_samples=False)
    figures = []
    for task, measures in results["results"].items():
        for key, value in measures.items():
            name, _, way = key.partition(",")
            if way and not name.endswith("_stderr") and isinstance(value, int | float):
                error = measures.get(f"{name}_stderr,{way}")
                error = float(error) if isinstance(error, int | float) else None
                figures.append(Figure(task, name if way == "none" else f"{name} ({way})", float(value), error))
    return figures
