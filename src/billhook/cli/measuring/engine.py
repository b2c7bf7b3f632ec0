"""`billhook bench --engine llama.cpp`: the speed of folders in the engine itself, dense beside cut."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from billhook.arguments import whole
from billhook.assets import model_path
from billhook.report.table import aligned
from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp
from billhook.serving.speed import EngineSpeed, measure_engine, speed_up
from billhook.serving.worker import WorkerError
from billhook.serving.written import write_gguf

KINDS = ("F16", "Q4_K_M")


def bench_engine(
    models: Sequence[str], names: Sequence[str], contexts: Sequence[int], new_tokens: int, rounds: int, warmup: int, threads: int
) -> tuple[str, list[dict[str, object]]]:
    """Converts folders to F16 and Q4_K_M, and measures them; returns a table and the figures.

    Raises:
        ValueError: If a number is too small, or a folder cannot be converted; the message says why.
    """
    for name, value, least in (("new_tokens", new_tokens, 2), ("rounds", rounds, 2), ("warmup", warmup, 0)):
        whole(name, value, least)
    for context in contexts:
        whole("contexts", context)
    lines, record = [["kind", "context", "model", "GB", "prompt/s", "written/s"]], list[dict[str, object]]()
    lines[0] += ["prompt x", "(quartiles)", "written x", "(quartiles)"] if len(models) > 1 else []
    total = len(KINDS) * len(contexts) * len(models) * (warmup + rounds)
    with tempfile.TemporaryDirectory() as place, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        for kind, files in zip(KINDS, _written(models, Path(place)), strict=True):
            for context in contexts:
                found = measure_engine(files, context, new_tokens, rounds, warmup, threads, lambda: bar.advance(task))
                for name, file, own in zip(names, files, found, strict=True):
                    size = file.stat().st_size
                    lines.append([kind, f"{context:,}", name, f"{size / 1e9:.3f}", *_cells(own), *_compared(found[0], own)])
                    record.append({"kind": kind, "model": name, "bytes": size, **vars(own)})
    return aligned([line[: len(lines[0])] for line in lines]), record


def _written(models: Sequence[str], place: Path) -> list[list[Path]]:
    """Writes the files of all models, by kind."""
    plain, quantised = ([place / f"{number}-{kind}.gguf" for number in range(len(models))] for kind in KINDS)
    try:
        with Converter() as converter, LlamaCpp() as engine:
            for model, file, smaller in zip(models, plain, quantised, strict=True):
                write_gguf(model_path(model), file, converter, "f16", ids_alone=True)
                engine.quantise(file, smaller, "Q4_K_M")
    except WorkerError as error:
        raise ValueError(f"models: '{model}' cannot be converted: {error}") from error
    return [plain, quantised]


def _cells(own: EngineSpeed) -> list[str]:
    return [f"{own.prompt_rate:,.1f}", f"{own.writing_rate:,.1f}"]


def _compared(first: EngineSpeed, own: EngineSpeed) -> list[str]:
    """Shows how many times as fast as the first a file is, in reading and in writing."""
    if own is first:
        return [""] * 4
    ratios = (speed_up(first.read, own.read), speed_up(first.written, own.written))
    return [cell for low, middle, high in ratios for cell in (f"{middle:.2f}", f"({low:.2f}-{high:.2f})")]
