"""`billhook evaluate`: accuracy, perplexity, and lm-eval tasks of models, side by side."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_int
from billhook.assets import model_path
from billhook.calibration.reading import Rows
from billhook.checkpoints.save import load
from billhook.cli import images
from billhook.cli.examples import IMAGE_COLUMN
from billhook.cli.machine import check_file, device_of, file_progress, model_progress, write_json
from billhook.display import render_table
from billhook.model import check_tokenizer, load_tokenizer, model_class, read_config, text_config
from billhook.model import stream as open_streamed
from billhook.progress import progress_bar
from billhook.report.choices import read_questions
from billhook.training.evaluation import (
    LONGEST,
    Asked,
    Figure,
    accuracies,
    blocks,
    encoded,
    mean,
    on_questions,
    on_text,
    score_choices,
    shown,
)
from billhook.versions import versions


@dataclass(frozen=True)
class _Work:
    """The evaluation of one model, on data that is tokenized with its tokenizer."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, Asked]
    text: Rows | None
    tasks: list[str]
    length: int
    examples: int
    batch_size: int
    limit: int | None

    def __call__(self, model: PreTrainedModel) -> images.Result:
        """Returns the results of a model, and the likelihoods of each file's choices."""
        check_tokenizer(model, self.tokenizer)
        tasks = self._harness(model) if self.tasks else []
        with progress_bar(f"{self.model}: questions", "tokens") as progress:
            scored = score_choices(model, f"models: '{self.model}'", self.sets, self.batch_size, progress)
        with model_progress(model, f"{self.model}: text", "blocks") as progress:
            figures = [*on_questions(scored), *on_text(model, self.text, self.length, self.examples, progress)]
        answers = {}
        for file, likelihoods in scored.items():
            right, right_normed = accuracies(file, likelihoods)
            answers[file] = [
                {"line": question.line, "label": question.label, "acc": plain, "acc_norm": norm, "log_likelihoods": sums}
                for (question, sums), plain, norm in zip(likelihoods, right.each or (), right_normed.each or (), strict=True)
            ]
        cut = sum(row.cut for sources in self.sets.values() for _, rows in sources for row in rows)
        return figures + tasks, {"cut": cut, "answers": answers}

    def _harness(self, model: PreTrainedModel) -> list[Figure]:
        """Runs lm-eval tasks, and returns each metric with lm-eval's standard error."""
        wrapper = import_module("lm_eval.models.huggingface").HFLM
        wrapped = wrapper(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size, max_length=self.length)
        try:
            results = import_module("lm_eval").simple_evaluate(
                model=wrapped, tasks=self.tasks, limit=self.limit, log_samples=False
            )
        except KeyError as missing:
            if not (unknown := [name for name in self.tasks if name in str(missing)]):
                raise
            raise ValueError(
                f"tasks={unknown[0]}: lm-eval has no task of this name. Pass the path of the YAML file for a task of your own. "
                "`lm_eval ls tasks` lists the others."
            ) from missing
        figures = []
        for task, measures in results["results"].items():
            for key, value in measures.items():
                name, _, way = key.partition(",")
                if way and not name.endswith("_stderr") and isinstance(value, int | float):
                    error = measures.get(f"{name}_stderr,{way}")
                    error = float(error) if isinstance(error, int | float) else None
                    figures.append(Figure(task, name if way == "none" else f"{name} ({way})", float(value), error))
        return figures


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
    """Evaluates models side by side: multiple-choice accuracy, perplexity, lm-eval, images.

    Multiple-choice questions are answered zero-shot, by the choice with the highest log-likelihood (acc), or the highest
    log-likelihood per character (acc_norm), as in lm-eval; ties go to the first choice. Standard errors are binomial,
    sqrt(p (1 - p) / (n - 1)). The difference to the first model has the paired standard error over questions.

    For image classifiers, the command reports accuracy (acc), with more than five classes also top-5 accuracy (acc_top5), and the
    share of images with the same prediction as the first model (agreement).

    Args:
        models: Folders, Hub names, or "tiny". The first is the baseline: `evaluate before after ...`.
        data: Files of questions, as JSON Lines: `{"context": "Question: ... Answer:", "choices": ["one", "two"], "label": 1}`. A
            choice follows the context and a space. For image classifiers, folders with one subfolder per class, .parquet files,
            or Hub names, evaluated on the split `test`, else `validation`, else the only split.
        text: File (.txt, .jsonl, .csv, .parquet) to measure perplexity on, or "tiny" (the packaged text). All models must have
            the same tokenizer; for others, see `billhook verdict`.
        tasks: lm-eval tasks, such as `--tasks hellaswag,arc_easy`; requires `pip install 'billhook[eval]'`. Their differences
            have no standard errors.
        limit: Number of questions per file and per lm-eval task, from the start, or of images, drawn at random with a fixed seed.
            Defaults to all.
        length: Tokens per example. Longer contexts are cut from the left, and the text is split into blocks of this length.
            Defaults to 2048, or the longest that all models support.
        examples: Number of blocks of the text, from the start.
        batch_size: Choices or images per batch.
        column: Column of the text, or of images (there by default "image").
        label_column: Column of image labels.
        dtype: Data type of the weights: "auto" (as saved), "float32", "bfloat16", or "float16".
        device: Device to compute on. "auto" uses an accelerator that supports float64 (Apple's do not), else the CPU. Blocks of
            a streamed model run there one at a time; with "auto" on the CPU.
        stream: If true, loads one block at a time from disk. Only for perplexity on `text`.
        json: JSON file for the results, the likelihood of each choice, the settings, and the versions.

    Raises:
        ValueError: If an argument is not legal, before any model is loaded, or a model computes non-finite logits.
    """
    check_int("limit", 1 if limit is None else limit)
    check_int("examples", examples)
    check_int("batch_size", batch_size)
    check_file("json", json, ".json")
    if not models or not (data or text or tasks):
        raise ValueError("nothing to evaluate. Pass models, and at least one of --data, --text, and --tasks.")
    of_images = any(map(images.classifies, models))
    computes_on = device_of(device)
    settings: dict[str, Any] = {"data": data, "limit": limit, "batch_size": batch_size, "column": column}
    if of_images:
        images.check(models, {"text": text, "tasks": tasks, "length": length, "stream": stream})
        settings |= {"column": IMAGE_COLUMN if column == "text" else column, "label_column": label_column}
        works = images.prepare(models, data or [], limit, batch_size, settings["column"], label_column)
    else:
        if stream and (data or tasks):
            raise ValueError("stream=True only supports --text. Remove --data and --tasks, or --stream.")
        if stream and device == "auto":
            computes_on = torch.device("cpu")
        tasks = _tasks(tasks or [])
        length = _length(models, length)
        settings |= {"text": text, "tasks": tasks, "length": length, "examples": examples}
        works = _prepare(models, data or [], text, tasks, limit, length, examples, batch_size, column)
    results = list[images.Result]()
    for name, work in zip(models, works, strict=True):
        began = time.perf_counter()
        with file_progress(f"loading {name}"):
            model = open_streamed(name, None, dtype, computes_on) if stream else load(name, dtype)
        if not stream:
            model.to(computes_on)  # type: ignore[arg-type]
        figures, about = work(model)
        results.append((figures, {"model": name, "dtype": str(model.dtype), "seconds": time.perf_counter() - began} | about))
        del model  # before the next one is loaded
    all_figures, details = zip(*results, strict=True)
    if of_images and len(models) > 1:
        for figures, about in results:
            figures += images.agreements(about["answers"], details[0]["answers"])
    print(metric_table(models, all_figures))
    for name, about in zip(models, details, strict=True):
        if about.get("cut"):
            print(f"{name}: the contexts of {about['cut']} choices were cut from the left to length={settings['length']}")
    if json is not None:
        settings |= {"dtype": dtype, "device": str(computes_on)}
        of_models = [about | {"figures": _plain(figures, all_figures[0])} for figures, about in results]
        used = versions("tokenizers", *(["lm_eval"] if settings.get("tasks") else []))
        write_json(json, {"versions": used, "settings": settings, "models": of_models})


def _length(models: Sequence[str], length: int | None) -> int:
    """Returns the tokens per example, or raises if a model is no causal language model."""
    longest = {}
    for name in models:
        path = model_path(name)
        config = read_config(path)
        kind = model_class(config, path).__name__
        if "CausalLM" not in kind and "LMHead" not in kind:
            raise ValueError(f"models: '{name}' is a {kind}, which predicts no next token. Pass causal language models.")
        longest[name] = getattr(text_config(config), "max_position_embeddings", None) or length or LONGEST
    most = min(longest, key=longest.__getitem__)
    if length is not None and not 2 <= length <= longest[most]:
        raise ValueError(f"length={length} must be from 2 to {longest[most]}, the maximum of '{most}'.")
    return length or min(LONGEST, longest[most])


def _prepare(
    models: Sequence[str],
    data: Sequence[str],
    text: str | None,
    tasks: list[str],
    limit: int | None,
    length: int,
    examples: int,
    batch_size: int,
    column: str,
) -> list[images.Work]:
    """Tokenizes the evaluation data, and returns a function for each model that evaluates it."""
    questions = [read_questions(file, limit, "data") for file in data]
    works = list[images.Work]()
    tokenizers = list(map(load_tokenizer, models))
    if text is not None and any(tokenizer.get_vocab() != tokenizers[0].get_vocab() for tokenizer in tokenizers):
        raise ValueError(
            "text: perplexities of models with different tokenizers are not comparable. "
            "`billhook verdict` compares bits per byte."
        )
    for name, tokenizer in zip(models, tokenizers, strict=True):
        rows = None if text is None else blocks(text, model_path(name), length, column)
        sets = encoded(questions, tokenizer, length, "data")
        works.append(_Work(name, tokenizer, sets, rows, tasks, length, examples, batch_size, limit))
    return works


def difference(figure: Figure, first: Figure) -> tuple[float, float | None]:
    """Returns the difference to the first model's result, with its paired standard error."""
    if figure.each is None or first.each is None:
        return figure.value - first.value, None
    return mean([a - b for a, b in zip(figure.each, first.each, strict=True)])


def metric_table(models: Sequence[str], figures: Sequence[Sequence[Figure]]) -> str:
    """Returns a table of metrics by model, with differences to the first model."""
    rows = []
    for first, *others in zip(*figures, strict=True):
        cells = [f"{shown(other.value, other.error)}  ({shown(*difference(other, first), sign='+')})" for other in others]
        rows.append([first.of, first.measure, shown(first.value, first.error), *cells])
    legend = f"(difference to {models[0]}; ± standard error)" if len(models) > 1 else "(± standard error)"
    return f"{render_table(['', '', *models], rows, aligns='<')}\n\n{legend}"


def _plain(figures: Sequence[Figure], first: Sequence[Figure]) -> list[dict[str, Any]]:
    """Returns results as plain data, with their differences to the first model."""
    plain = []
    for figure, other in zip(figures, first, strict=True):
        numbers = {"value": figure.value, "error": figure.error}
        numbers |= zip(("difference", "difference_error"), difference(figure, other), strict=True)
        finite = {key: str(x) if x is not None and not math.isfinite(x) else x for key, x in numbers.items()}
        plain.append({"of": figure.of, "measure": figure.measure, **finite})
    return plain


def _tasks(tasks: Sequence[str]) -> list[str]:
    """Splits task names at commas, and raises if lm-eval is not installed."""
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if tasks and util.find_spec("lm_eval") is None:
        raise ValueError(f"tasks={','.join(tasks)} requires lm-eval. Install it: pip install 'billhook[eval]'")
    return names
