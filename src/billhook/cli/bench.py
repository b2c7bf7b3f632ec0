"""`billhook bench`: prefill and decoding speed, and the share of the ideal speedup."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.arguments import check_int, check_one_of
from billhook.assets import model_path
from billhook.calibration.calibration import MIXED
from billhook.calibration.reading import load_splits
from billhook.checkpoints.save import load
from billhook.cli.machine import check_file, cpu_threads, device_of, file_progress, machine_name, write_json
from billhook.display import render_table
from billhook.model import from_name, load_tokenizer, may_have_preprocessor, shape_beyond_config, text_config
from billhook.progress import progress_bar
from billhook.report.generation import CacheKind, generates
from billhook.report.speed import Phase, Timing, check_speed, measure_speed, spread
from billhook.report.summary import Summary, summary
from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp, measure_engine, speed_up
from billhook.serving.worker import WorkerError
from billhook.serving.written import write_gguf
from billhook.versions import versions

KINDS = ("F16", "Q4_K_M")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CONTEXTS = (512, 2048)
"""Default prompt lengths in tokens, if the models support them."""


def bench(
    models: list[str],
    batch_sizes: list[int] | None = None,
    contexts: list[int] | None = None,
    new_tokens: int = 16,
    rounds: int = 5,
    warmup: int = 1,
    phases: list[Phase] | None = None,
    cache: CacheKind = "static",
    random: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    plot: str | None = None,
    json: str | None = None,
    engine: Literal["transformers", "llama.cpp"] = "transformers",
) -> None:
    """Measures prefill and decoding speed, and compares it with the ideal speedup.

    Models are timed in interleaved rounds, in alternating order, so that a disturbance affects all of them. A speedup is the
    median over rounds of the ratio to the first model in the same round, with quartiles. Prompts are random tokens without
    padding, decoding is greedy, and only the logits of the last token are computed.

    The ideal speedup of decoding is the ratio of the bytes that a step reads: all weights once (except lookup tables), and the KV
    cache of all sequences. It is reached if memory bandwidth is the bottleneck; GB/s shows how close the machine gets. The ideal
    of prefill is the ratio of floating-point operations, with full attention matrices. All experts of a mixture count as read.
    For a model that predicts no next token, only prefill is timed.

    If models have different tokenizers, the same text has another number of tokens in each. The table then also shows bytes of
    packaged text per second.

    Args:
        models: Folders, Hub names, or "tiny". The first is the baseline: `bench dense converted ...`.
        batch_sizes: Batch sizes, such as `1 16` (the default).
        contexts: Prompt lengths in tokens, such as `512 2048`. Defaults to these, or to the longest that all models support.
        new_tokens: Number of tokens to decode after the prompt in each round.
        rounds: Number of timed rounds.
        warmup: Number of rounds before them that are not timed.
        phases: `prefill decode` (the default), or one of them. For decoding alone, one prompt is processed, and its keys and
            values are copied to all sequences.
        cache: "static": allocated once, with the query heads of a KV head in one matrix; by far the fastest on a CPU. "reserved":
            allocated once, without a mask and with `enable_gqa`, for CUDA kernels. "dynamic": the default of `generate`, which
            copies the cache at each step and so favors the model with the smaller cache.
        random: If true, uses random weights; a folder then only needs a config.json.
        dtype: Data type of the weights and the cache: "auto" (as saved), "float32", "bfloat16", or "float16".
        device: Device to compute on. "auto" uses an accelerator that supports float64 (Apple's do not), else the CPU.
        threads: Number of CPU threads. Defaults to torch's.
        seed: Seed of the prompts and the random weights.
        plot: PNG file for a plot.
        json: JSON file for the times of each round, the settings, and the versions.
        engine: "transformers", or "llama.cpp" to convert the folders (`billhook export --gguf`) and time them on a CPU as F16 and
            Q4_K_M, one sequence at a time. llama.cpp only supports `contexts`, `new_tokens`, `rounds`, `warmup`, `threads`, and
            `json`.

    Raises:
        ValueError: If an argument is not legal, before any weights are read.
    """
    sizes = batch_sizes or [1, 16]
    measured = phases or ["prefill", "decode"]
    check_one_of("dtype", dtype, DTYPES)
    check_int("threads", 1 if threads is None else threads)
    check_file("plot", plot, ".png")
    check_file("json", json, ".json")
    if engine == "llama.cpp":
        usual = {"cache": ("static",), "dtype": ("auto",), "device": ("auto", "cpu")}
        others = {"batch_sizes": batch_sizes, "phases": phases, "plot": plot, "random": random, "cache": cache, "dtype": dtype}
        for name, value in (others | {"device": device, "seed": seed}).items():
            if value and value not in usual.get(name, ()):
                raise ValueError(f"{name}={value!r} is not supported with engine='llama.cpp'. Remove --{name}.")
        lengths = contexts or _supported_contexts(list(map(from_name, models)), new_tokens)
        _bench_llama_cpp(models, lengths, new_tokens, rounds, warmup, threads or torch.get_num_threads(), json)
        return
    computes_on = device_of(device)
    meta_models = list(map(from_name, models))
    lengths = contexts or _supported_contexts(meta_models, new_tokens)
    check_speed(meta_models, sizes, lengths, new_tokens, rounds, warmup, measured)
    with file_progress(f"loading {', '.join(models)}"):
        loaded = _random_models(models, meta_models, dtype, seed) if random else [load(name, dtype) for name in models]
    for model in loaded:
        model.to(computes_on)  # type: ignore[arg-type]
    with cpu_threads(threads) as used, progress_bar("measuring", "runs", steady=False) as report:
        total = len(sizes) * len(lengths) * len(measured) * len(models) * (warmup + rounds)
        done = itertools.count(1)
        rows = measure_speed(
            loaded, sizes, lengths, new_tokens, rounds, warmup, cache, measured, seed,
            progress=lambda: report(next(done), total),
        )  # fmt: skip
    names = _last_parts(models)
    summaries = list(map(summary, loaded))
    where = machine_name(computes_on, used)
    sizes_of_tokens = bytes_per_token(models)
    print(f"{where}, {', '.join(sorted({*map(_dtype, loaded)}))}, cache={cache}\n")
    print(timing_table(rows, names, sizes_of_tokens))
    print("\n".join([*_notes(rows, names, loaded, summaries), *_text_notes(names, sizes_of_tokens)]))
    if plot is not None:
        from billhook.plots.speed import speed  # matplotlib takes a second to import

        speed(rows, names).savefig(plot)
    if json is not None:
        settings = {"new_tokens": new_tokens, "rounds": rounds, "warmup": warmup, "cache": cache, "random": random, "seed": seed}
        about = [
            {"name": name, "dtype": _dtype(model)} | size.to_dict()
            for name, model, size in zip(models, loaded, summaries, strict=True)
        ]
        if sizes_of_tokens:
            about = [size | {"bytes_per_token": mean} for size, mean in zip(about, sizes_of_tokens, strict=True)]
        record = {"versions": versions(), "machine": where, "settings": settings, "models": about}
        write_json(json, record | {"rows": list(map(Timing.to_dict, rows))})


def _supported_contexts(models: Sequence[PreTrainedModel], new_tokens: int) -> list[int]:
    """Returns the default contexts that all models support, or the longest that they do."""
    limits = [getattr(text_config(model.config), "max_position_embeddings", None) for model in models]
    most = max(min(filter(None, limits), default=CONTEXTS[-1] + new_tokens) - new_tokens, 1)
    return [context for context in CONTEXTS if context <= most] or [most]


def _bench_llama_cpp(
    models: list[str], contexts: list[int], new_tokens: int, rounds: int, warmup: int, threads: int, json: str | None
) -> None:
    """Times folders in llama.cpp as F16 and Q4_K_M, and prints and writes the results."""
    check_int("new_tokens", new_tokens, 2)
    check_int("rounds", rounds, 2)
    check_int("warmup", warmup, 0)
    for context in contexts:
        check_int("contexts", context)
    names = _last_parts(models)
    lines = []
    record = []
    head = ["kind", "context", "model", "GB", "prefill tokens/s", "decoding tokens/s"]
    sizes_of_tokens = bytes_per_token(models)
    head += ["prefill bytes/s", "decoding bytes/s"] if sizes_of_tokens else []
    head += ["prefill x", "(quartiles)", "decoding x", "(quartiles)"] if len(models) > 1 else []
    total = len(KINDS) * len(contexts) * len(models) * (warmup + rounds)
    done = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder, progress_bar("measuring", "runs", steady=False) as report:
        plain, quantized = ([Path(folder, f"{number}-{kind}.gguf") for number in range(len(models))] for kind in KINDS)
        try:
            with Converter() as converter, LlamaCpp() as engine:
                for model, file, smaller in zip(models, plain, quantized, strict=True):
                    write_gguf(model_path(model), file, converter, "f16", ids_only=True)
                    engine.quantize(file, smaller, "Q4_K_M")
        except WorkerError as error:
            raise ValueError(f"models: '{model}' cannot be converted to GGUF: {error}") from error
        for kind, converted in zip(KINDS, (plain, quantized), strict=True):
            for context in contexts:
                speeds = measure_engine(
                    converted, context, new_tokens, rounds, warmup, threads, lambda: report(next(done), total)
                )
                for number, (name, file, speed) in enumerate(zip(names, converted, speeds, strict=True)):
                    size = file.stat().st_size
                    first = speeds[0]
                    rates = (speed.prefill_rate, speed.decoding_rate)
                    cells = [kind, f"{context:,}", name, f"{size / 1e9:.3f}", *(f"{rate:,.1f}" for rate in rates)]
                    cells += [f"{rate * sizes_of_tokens[number]:,.0f}" for rate in rates if sizes_of_tokens]
                    if speed is not first:
                        for low, middle, high in map(speed_up, (first.prefill, first.decoding), (speed.prefill, speed.decoding)):
                            cells += [f"{middle:.2f}", f"({low:.2f}-{high:.2f})"]
                    lines.append(cells + [""] * (len(head) - len(cells)))
                    record.append({"kind": kind, "model": name, "bytes": size, **vars(speed)})
    where = f"llama.cpp, {machine_name(torch.device('cpu'), threads)}"
    print("\n".join([f"{where}\n\n{render_table(head, lines)}", *_text_notes(names, sizes_of_tokens)]))
    if json is not None:
        about = {"versions": versions("llama-cpp-py-sync"), "machine": where, "rounds": rounds, "warmup": warmup}
        write_json(json, about | {"rows": record})


def _random_models(models: Sequence[str], meta_models: Sequence[PreTrainedModel], dtype: str, seed: int) -> list[PreTrainedModel]:
    for name, meta_model in zip(models, meta_models, strict=True):
        if shape_beyond_config(meta_model).tensors:
            raise ValueError(f"random=True does not support the billhook checkpoint '{name}'. Remove --random.")
    made = []
    with torch.random.fork_rng(devices=[]):
        for meta_model in meta_models:
            torch.manual_seed(seed)
            model = type(meta_model)(meta_model.config)
            nn.Module.to(model, dtype=meta_model.dtype if dtype == "auto" else getattr(torch, dtype))
            model.train(False)
            made.append(model)
    return made


def bytes_per_token(models: Sequence[str]) -> list[float]:
    """Returns the bytes of packaged text per token of each model.

    Empty if all have the same tokenizer, or one has none.
    """
    if not all(map(may_have_preprocessor, models)):
        return []
    try:
        tokenizers = list(map(load_tokenizer, models))
    except (ValueError, OSError):  # of images
        return []
    if all(tokenizer.get_vocab() == tokenizers[0].get_vocab() for tokenizer in tokenizers):
        return []
    texts = [text for text in load_splits(MIXED)["validation"]["text"] if text]
    size = sum(len(text.encode()) for text in texts)
    return [size / sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) for tokenizer in tokenizers]


def _text_notes(names: Sequence[str], sizes_of_tokens: Sequence[float]) -> list[str]:
    """Returns lines on the number of tokens of the same text."""
    lines = []
    for name, size in zip(names, sizes_of_tokens, strict=False):
        ratio = sizes_of_tokens[0] / size
        lines.append(f"{name}: {size:.2f} bytes per token of packaged text, {ratio:.3f}x the tokens of {names[0]}")
    return lines


def timing_table(rows: Sequence[Timing], names: Sequence[str], sizes_of_tokens: Sequence[float] = ()) -> str:
    """Returns a table for each phase, with a row for each batch size, context, and model."""
    tables = []
    for phase, time, rate in (("prefill", "ms", "GFLOP/s"), ("decode", "ms/token", "GB/s")):
        head = [phase, "batch", "context", time, "(quartiles)", "tokens/s", "peak MB", "cache MB", rate]
        head += ["bytes/s"] if sizes_of_tokens else []
        head += ["speed-up", "(quartiles)", "ideal", "reached"] if len(names) > 1 else []
        lines = []
        for row in rows:
            if row.phase != phase:
                continue
            cells = [names[row.model], str(row.batch_size), f"{row.context:,}", f"{1e3 * row.median:,.2f}"]
            low, high = (1e3 * edge for edge in spread(row.seconds))
            cells.append(f"({low:,.2f}-{high:,.2f})")
            peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}"
            cells += [f"{row.tokens_per_second:,.1f}", peak, f"{row.cache_bytes / 1e6:,.1f}"]
            cells.append("-" if row.rate is None else f"{row.rate / 1e9:,.1f}")
            cells += [f"{row.tokens_per_second * sizes_of_tokens[row.model]:,.0f}"] if sizes_of_tokens else []
            if row.model:
                low, high = spread(row.ratios)
                cells += [f"{row.speed_up:.2f}", f"({low:.2f}-{high:.2f})"]
                cells += ["-", "-"] if row.ideal is None or row.share is None else [f"{row.ideal:.2f}", f"{row.share:.0%}"]
            lines.append(cells + [""] * (len(head) - len(cells)))
        if lines:
            tables.append(render_table(head, lines))
    return "\n\n".join(tables)


def _notes(
    rows: Sequence[Timing], names: Sequence[str], models: Sequence[PreTrainedModel], summaries: Sequence[Summary]
) -> list[str]:
    """Returns lines on the KV cache per token, and on missing measurements."""
    lines = [""]
    cached = {row.model: row.cache_bytes_per_token for row in rows if row.cache_bytes}
    for number, size in cached.items():
        note = f"KV cache of {names[number]}: {size:,.0f} bytes per token and sequence"
        predicted = summaries[number].kv_cache_bytes
        heads = summaries[number].kv_heads
        note += f" ({predicted:,} expected)" if predicted else ""
        note += f", {heads} KV head{'s' if heads > 1 else ''}" if heads else ""
        if number and cached.get(0):
            first = summaries[0].kv_heads
            note += f": {cached[0] / size:.2f}x smaller"
            note += f", {first / heads:.2f}x fewer heads" if first and heads else ""
        lines.append(note)
    no_decoding = []
    mixtures = []
    for name, model in zip(names, models, strict=True):
        if not generates(model):
            no_decoding.append(name)
        config = text_config(model.config)
        if any(getattr(config, count, None) for count in ("num_experts", "num_local_experts", "n_routed_experts")):
            mixtures.append(name)
    if no_decoding:
        lines.append(f"prefill only, without next-token prediction: {', '.join(no_decoding)}")
    if any(row.peak_bytes is None for row in rows):
        lines.append("peak MB: not available on this system")
    elif models[0].device.type == "cpu":
        lines.append("peak MB: weights, cache, and the increase of the resident memory of the process")
    if mixtures:
        lines.append(f"ideal: all experts of {', '.join(mixtures)} count as read in each step")
    return lines


def _last_parts(models: Sequence[str]) -> list[str]:
    """Shortens names to their last parts, if these differ."""
    last = [Path(name).name for name in models]
    return last if len({*last}) == len(last) else list(models)


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
