"""Memory and time of models that stay in their files: commands with `--stream`, each in a process of its own.

`OMP_NUM_THREADS=1 python benchmarks/larger.py WORK [MODEL ...] --out larger.md`; a MODEL is a folder, or the name of a random
Llama in bfloat16, `1.2B`, `13B`, or `10 of 13B`, ten of its blocks, which is written into WORK shard by shard (all blocks hold
the same random numbers; memory and time do not depend on them). Text is the embedded one, by the embedded tokenizer,
`--examples` of 128 tokens, few as these machines are slow; what blocks hand on grows with the text: 2 x tokens x hidden size x
bytes of a number. A refit needs as many tokens as inputs that it keeps. Peaks are of resident memory; the interpreter's own,
with billhook imported, is printed first. `--memory` is handed on. An output is removed when it is measured; WORK needs as many
bytes again as a model has. `--computed 70B` measures nothing: it says what a model of that size would take, from its shape, if
CPU time grew with the parameters in blocks, as `--seconds` of a model of 1.2 billion say.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from measured import Lines
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from billhook.assets import model_path, text_files

SIZES = {
    "1.2B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
COMPUTED = {  # name: hidden size, width of the feed-forward, blocks, heads, KV heads, vocabulary
    "1.2B": (2048, 5632, 22, 16, 16, 32_000),
    "13B": (5120, 13824, 40, 40, 40, 32_000),
    "70B": (8192, 28672, 80, 64, 8, 128_256),
}
PASSES = 8
"""Passes of `prune` over the blocks: the one in which zeros are counted first, and those that its plan names."""
COMMANDS = {
    "Wanda, 50 %": ["prune", "--sparsity", "0.5"],
    "SparseGPT, 50 %": ["prune", "--criterion", "billhook.SparseGPT", "--sparsity", "0.5"],
    "25 % of the FFN, with repair": ["prune-structure", "--channels", "0.25"],
    "KV heads to a fifth or a quarter, mean": ["convert", "--num_key_value_heads"],
}
TEXT = ["--length", "128", "--evaluate", "2", "--batch_size", "1"]


def sizes_of(name):
    """The sizes of a random Llama, or of some of its blocks; None for another name."""
    some, _, size = name.rpartition(" of ")
    return SIZES[size] | ({"num_hidden_layers": int(some)} if some else {}) if size in SIZES else None


def write(folder, sizes):
    """Writes a random Llama, a file for each block."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, **sizes)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    hidden, wide, count = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    folder.mkdir(parents=True)

    def drawn(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    shapes = dict.fromkeys((f"self_attn.{one}_proj" for one in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    block = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    block |= {
        f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")
    }
    rest = {"model.embed_tokens.weight": drawn(32000, hidden), "lm_head.weight": drawn(32000, hidden)}
    rest["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    where, total = {}, 0
    for number in range(count + 1):
        name = f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors"
        tensors = rest if number == count else {f"model.layers.{number}.{key}": one for key, one in block.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(one.nbytes for one in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path("tiny")).save_pretrained(folder)


def computed(size, seconds):
    """Says what Wanda would take in bfloat16: bytes, and at most so much memory above the interpreter's.

    That is what stays, a block three times over, and 1 GiB.
    """

    def parameters(name):
        hidden, wide, count, heads, kv, vocabulary = COMPUTED[name]
        block = 2 * hidden**2 + 2 * hidden * (hidden // heads * kv) + 3 * hidden * wide + 2 * hidden
        return block, count, 2 * vocabulary * hidden + hidden

    block, count, rest = parameters(size)
    peak = (rest + 3 * block) * 2 / 2**30 + 1
    small, times, _ = parameters("1.2B")
    hours = seconds * block * count / (small * times) / 3600
    read, written = 2e-9 * block * count * PASSES, 2e-9 * (block * count + rest)
    return f"{size}, computed: peak at most {peak:.1f} GiB, {read:,.0f} GB read, {written:,.0f} GB written, {hours:.1f} CPU hours"


def heads(model):
    """A fifth of the KV heads, or a quarter, or one."""
    config = json.loads((model / "config.json").read_text())
    kv = config.get("num_key_value_heads") or config["num_attention_heads"]
    return next((kv // by for by in (5, 4) if kv % by == 0), 1)


def peak(command):
    """Runs a command; returns its peak of resident memory in bytes, its CPU seconds and its seconds."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    if status:
        sys.exit(output)
    return used.ru_maxrss * 1024, used.ru_utime + used.ru_stime, time.monotonic() - start


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="*", default=["1.2B"])
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--examples", default="8", help="of 128 tokens, that are calibrated on")
    parser.add_argument("--memory", help="as of the commands")
    parser.add_argument("--in_memory", action="store_true", help="measure the same commands without --stream beside them")
    parser.add_argument("--computed", choices=list(COMPUTED), help="say what a model would take, and measure nothing")
    parser.add_argument("--seconds", type=float, default=82, help="CPU seconds that Wanda took on 1.2B")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.computed:
        print(computed(options.computed, options.seconds))
        return
    torch.manual_seed(0)
    own, *_ = peak([sys.executable, "-c", "import billhook.cli.main, billhook"])
    print(f"the interpreter's own: {own / 2**30:.2f} GiB", flush=True)
    table = Lines(options.out, ["model", "weights, GiB", "what", "how", "peak, GiB", "above the interpreter", "CPU s", "s"])
    limit = ["--memory", options.memory] if options.memory else []
    for name in options.models:
        sizes = sizes_of(name)
        model = Path(name) if sizes is None else options.work / name
        if not model.exists():
            write(model, sizes)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**30
        for what in options.only:
            for how in [["--stream", *limit], *([[]] if options.in_memory else [])]:
                command = COMMANDS[what] + ([str(heads(model))] if what.startswith("KV") else [])
                out = options.work / "out"
                text = ["--data", json.dumps({"train": str(text_files()["train"]), "test": str(text_files()["validation"])})]
                billhook = [sys.executable, "-c", "from billhook.cli.main import main; main()", command[0], str(model), str(out)]
                shown = ["--examples", options.examples, *TEXT]
                most, cpu, seconds = peak([*billhook, *command[1:], *shown, *text, *how])
                shutil.rmtree(out)
                row = [name, f"{size:.2f}", what, " ".join(how).replace("--", "") or "in memory"]
                table.add([*row, f"{most / 2**30:.2f}", f"{(most - own) / 2**30:.2f}", f"{cpu:.0f}", f"{seconds:.0f}"])


if __name__ == "__main__":
    main()
