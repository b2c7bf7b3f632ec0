"""`billhook verdict`: compares a changed model with the dense model and with limits."""

import json as encoding
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from billhook.arguments import check_int
from billhook.assets import model_path
from billhook.atomic_folder import RECORD
from billhook.calibration.calibration import MIXED, UNSEEN, Calibration, evaluation_batches, name_sources
from billhook.calibration.reading import check_available
from billhook.checkpoints.save import load
from billhook.cli.command_plan import WARMUP_TOKENS, time_forward
from billhook.cli.machine import check_file, device_of, file_progress, write_json
from billhook.model import load_tokenizer
from billhook.progress import format_duration, progress_bar
from billhook.report.generation import generates
from billhook.report.verdict import Limits, check_compared
from billhook.report.verdict import verdict as compare
from billhook.report.writing import NEW_TOKENS, TEMPERATURES

FAILED = 2
"""Exit code if a limit is broken; 1 is an error."""


def verdict(
    dense: str,
    model: str,
    limits: Limits,
    data: list[str] | None = None,
    examples: int = 8,
    prompts: int = 4,
    length: int = 512,
    column: str = "text",
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    cache: str | None = None,
    json: str | None = None,
    markdown: str | None = None,
) -> None:
    """Compares a changed model with the dense model, and fails if it breaks a limit.

    On each text it measures the ratio of perplexities (of bits per byte if the tokenizers differ), the KL divergence, the share
    of positions with the same most likely token, and the share of drafted tokens that the dense model would accept. Both models
    also write up to 256 tokens after prompts, greedily and at a temperature of 0.7, and the command counts the texts that loop.
    Encoders are compared by the KL divergence and labels of each token, or by the cosine of token states. The exit code is 0 if
    all limits hold, 2 if one is broken, and 1 after an error.

    Args:
        dense: The dense model: a folder, a Hub name, or "tiny".
        model: The changed model. If billhook has saved it, its record tells which texts it was calibrated on.
        limits: How much the models may differ.
        data: Text files, such as those that the model was calibrated on and others from your domain. Calibration examples are
            left out. Packaged text of eight kinds, and code and fiction that no command calibrates on, are always measured.
        examples: Number of examples of each text.
        prompts: Number of texts to write for each source and temperature, from the first 32 tokens of examples. 0 writes none,
            as do encoders.
        length: Tokens per example.
        column: Column of the text.
        seed: Seed for sampling.
        dtype: Data type of the weights: "auto" (as saved), "float32", "bfloat16", or "float16".
        device: Device to compute on. "auto" uses an accelerator that supports float64 (Apple's do not), else the CPU.
        cache: Folder for the dense model's figures, up to 128 MB for each set of examples, so that a further model takes half the
            time. Defaults to `billhook/verdicts` in the user's cache.
        json: JSON file for all figures.
        markdown: Markdown file (.md) for the tables, such as for a pull request.

    Raises:
        ValueError: If an argument is not legal, the models cannot be compared, or a figure with a limit is not measured.
    """
    check_int("examples", examples)
    check_int("length", length, 2)
    check_file("json", json, ".json")
    check_file("markdown", markdown, ".md")
    for source in data or ():
        check_available(source)
    tokenizers = load_tokenizer(dense), load_tokenizer(model)
    record = _record(model)
    with file_progress(f"loading {dense}"):
        before = load(dense, dtype)
    with file_progress(f"loading {model}"):
        after = load(model, dtype)
    for name, loaded in {"dense": before, "model": after}.items():
        check_compared(name, loaded)
        loaded.to(device_of(device))  # type: ignore[arg-type]
    calibration, inside = _texts(data or [], record, length, column, model_path(dense))
    batches = evaluation_batches(calibration, before, examples, UNSEEN, generated=False)
    count = sum(len(batch["input_ids"]) for batch in batches)
    time_forward(before, WARMUP_TOKENS)
    # a step of generation takes about as long as a forward pass on one token of each text
    texts = min(prompts, examples) * len({batch.source for batch in batches}) * generates(before)
    seconds = 2 * count * time_forward(before, length)
    seconds += 2 * len(TEMPERATURES) * NEW_TOKENS * time_forward(before, texts) if texts else 0
    print(f"{count} examples of {length} tokens, {texts} prompts: about {format_duration(seconds)} in all", flush=True)
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "billhook" / "verdicts"
    with progress_bar("comparing", "examples") as progress:
        result = compare(before, after, batches, inside, limits, prompts, seed, tokenizers, folder, progress)
    print(result.text())
    if json is not None:
        write_json(json, result.to_json())
    if markdown is not None:
        Path(markdown).write_text(result.markdown(), encoding="utf-8")
    if result.broken:
        sys.exit(FAILED)


def _record(model: str) -> Mapping[str, Any]:
    """Returns the record of a checkpoint that billhook has saved; empty for others."""
    try:
        record = encoding.loads(Path(model, RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _texts(
    data: Sequence[str], record: Mapping[str, Any], length: int, column: str, tokenizer: str
) -> tuple[Calibration, list[str]]:
    """Returns texts, with the recorded command's held-out examples, and the calibrated ones."""
    recorded = record.get("calibration")
    counts, seed = dict[str, int](), 0
    if isinstance(recorded, dict):
        with suppress(TypeError, ValueError, KeyError):  # a record of labeled data, or of another version
            calibration = Calibration(**{name: recorded[name] for name in ("sources", "weights", "tokens", "length", "seed")})
            counts, seed = calibration.examples(calibration.length or length), calibration.seed
            counts = {Path(name).stem: count for name, count in counts.items()}
    sources = [*data, MIXED]
    weights = [float(counts.get(name, 1)) for name in name_sources(sources)]
    tokens = int(sum(weights)) * length
    texts = Calibration(sources, weights, tokens, length, column=column, seed=seed, tokenizer=tokenizer)
    return texts, [name for name in texts.named if name in counts]
