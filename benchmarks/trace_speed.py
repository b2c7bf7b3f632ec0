"""How long `trace` takes on models that are on meta already, beside transformers' own forward of the same model on meta.

`python benchmarks/trace_speed.py --out trace_speed.md` writes the table; keys of MODELS restrict it. Set OMP_NUM_THREADS=1.

The forward is the plain one: no mode, no hooks, no gradients, no cache; its inputs, attention (sdpa) and experts (batched_mm)
are those of `trace`. On meta it would raise where code asks for a value (masks: `if (packed == 0).all():`), so `__bool__` and
`item` of tensors are replaced by functions that answer True and 1, as `trace` does: a handful of calls, no slower than answers.

Forward and trace take turns; each time is CPU time, the median; the ratio is the median of the pairs. The copy (`to_meta`), the
grouping (`couple`) and the run (all the rest) are timed inside `trace`. "Again" is a trace of a model like one traced before,
which is remembered; all is forgotten before each first trace. Memory is by how much a fresh process grows over its first trace,
after one forward.
"""

import argparse
import contextlib
import logging
import multiprocessing
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from billhook.model.cache import clear_cache
from billhook.model.inputs import make_inputs
from billhook.tracing import trace as tracing

QWEN3 = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8, "vocab_size": 151936}
T5 = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}
BERT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS = {
    "Llama-2-7B": (LlamaForCausalLM, LlamaConfig, {}),
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}),
    "Qwen3-8B": (Qwen3ForCausalLM, Qwen3Config, QWEN3),
    "GPT-2-XL": (GPT2LMHeadModel, GPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "BERT-large": (BertForMaskedLM, BertConfig, BERT),
    "T5-3B": (T5ForConditionalGeneration, T5Config, T5),
    "Mixtral-8x7B": (MixtralForCausalLM, MixtralConfig, {}),
    "DeepSeek-V3": (DeepseekV3ForCausalLM, DeepseekV3Config, {}),
}
DEPTHS = {f"Llama, {n} layers": (LlamaForCausalLM, LlamaConfig, {"num_hidden_layers": n}) for n in (8, 16, 32, 64)}
HEADER = (
    "model | parameters | layers | forward ms | trace ms | ratio | again ms | "
    "copy | run | group | ms a layer | groups | memory MB"
)


def build(name):
    """A model on meta."""
    model_class, config_class, values = (MODELS | DEPTHS)[name]
    config = config_class(**values)
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        return model_class(config).eval()


@contextlib.contextmanager
def answering():
    """Lets code ask a meta tensor for its value."""

    def true(_):
        return True

    def one(tensor):
        return 1.0 if tensor.is_floating_point() else 1

    with mock.patch.object(torch.Tensor, "__bool__", true), mock.patch.object(torch.Tensor, "item", one):
        yield


def forward(model):
    """Seconds of one plain forward."""
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in make_inputs(model).items()}
    with answering(), torch.no_grad():
        start = time.process_time()
        model(**inputs)
        return time.process_time() - start


def stages(model):
    """Seconds of one trace, of the copy and of the grouping in it, and what it found."""
    spent = {}

    def timed(name):
        inner = getattr(tracing, name)

        def outer(*args):
            start = time.process_time()
            result = inner(*args)
            spent[name] = time.process_time() - start
            return result

        return mock.patch.object(tracing, name, outer)

    clear_cache()
    with timed("to_meta"), timed("couple"):
        start = time.process_time()
        structure = tracing.trace(model)
        return time.process_time() - start, spent["to_meta"], spent["couple"], structure


def resident(peak=False):
    """Megabytes of resident memory, now or at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def memory(name, pipe):
    """Sends by how many megabytes the first trace makes this process grow."""
    model = build(name)
    forward(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident()
    structure = tracing.trace(model)
    assert structure.groups
    pipe.send(resident(peak=True) - before)


def measure(name, repetitions):
    """One row of the table."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=memory, args=(name, sender))
    process.start()
    grown = receiver.recv()
    process.join()
    model = build(name)
    forward(model), stages(model)
    times = defaultdict(list)
    for _ in range(repetitions):
        plain = forward(model)
        whole, copy, couple, structure = stages(model)
        start = time.process_time()
        tracing.trace(model)
        again = time.process_time() - start
        figures = {"plain": plain, "whole": whole, "copy": copy, "couple": couple, "ratio": whole / plain, "again": again}
        for key, value in figures.items():
            times[key].append(value)
    mid = {key: median(values) for key, values in times.items()}
    layers = max(len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers *= 2 if model.config.is_encoder_decoder else 1
    ms = [f"{1000 * t:.0f}" for t in (mid["copy"], mid["whole"] - mid["copy"] - mid["couple"], mid["couple"])]
    return [
        name,
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B",
        str(layers),
        f"{1000 * mid['plain']:.0f}",
        f"{1000 * mid['whole']:.0f}",
        f"{mid['ratio']:.2f}",
        f"{1000 * mid['again']:.0f}",
        *ms,
        f"{1000 * mid['whole'] / layers:.1f}",
        str(len(structure.groups)),
        f"{grown:.0f}",
    ]


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS | DEPTHS)}; all by default")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the table is written")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable()
    stages(build("BERT-large"))  # what the first run on meta of a process imports
    lines = [f"| {HEADER} |", "|---|" + "---:|" * HEADER.count("|")]
    print("\n".join(lines))
    for name in arguments.names or MODELS | DEPTHS:
        lines.append(f"| {' | '.join(measure(name, arguments.repetitions))} |")
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
