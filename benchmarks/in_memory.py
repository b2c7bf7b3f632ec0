"""Memory and time of a model that is in memory as a whole: pruned, saved and planned for, each in a process of its own.

`OMP_NUM_THREADS=1 python benchmarks/in_memory.py WORK [MODEL ...] --out in_memory.md`; a MODEL is a folder, or the name of a
random Llama that `larger.py` writes into WORK. Batches are eight of 128 random tokens. Peaks are of resident memory, above the
model, which has been copied out of its files first; `save` is to WORK, and what it has written is removed. Half of the weights go
where weights are pruned; the plan is to 80 % of the parameters, by random scores.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from larger import SIZES, write
from measured import Lines

import billhook as bh
from billhook.engine.memory import resident

CRITERIA = {"Magnitude": bh.Magnitude, "Wanda": bh.Wanda}
WHAT = [*CRITERIA, "save", "plan"]


def start():
    """Lets the peak start from now; bytes of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def act(what, model, out):
    """Does what is measured."""
    generator = torch.Generator().manual_seed(0)
    if what == "save":
        bh.save(model, out)
    elif what == "plan":
        units = bh.find_units(model, ["head", "channel"])
        scores = {name: torch.rand(one.count(), generator=generator) for name, one in units.items()}
        bh.plan(model, scores=scores, amount=bh.Amount(params=0.8))
    else:
        size = model.config.vocab_size
        batches = [{"input_ids": torch.randint(size, (1, 128), generator=generator)} for _ in range(8)]
        bh.prune(model, CRITERIA[what](), batches if what == "Wanda" else None, sparsity=0.5)


def measure(what, folder, out):
    """Bytes of the model, bytes above it at most, CPU seconds, seconds."""
    model = bh.load(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # out of the files, so that reading them does not count
    before, cpu, now = start(), time.process_time(), time.monotonic()
    act(what, model, out)
    cpu, now = time.process_time() - cpu, time.monotonic() - now
    size = sum(parameter.nbytes for parameter in model.parameters())
    return size, resident("VmHWM") - before, cpu, now


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="*", default=["1.2B"])
    parser.add_argument("--only", nargs="*", default=WHAT, choices=WHAT)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.work / "saved"
    if options.here:
        torch.set_num_threads(1)
        print(*measure(options.only[0], options.models[0], out))
        return
    table = Lines(options.out, ["model", "weights, GiB", "what", "peak above the model, GiB", "CPU s", "s"])
    for name in options.models:
        model = options.work / name if name in SIZES else Path(name)
        if not model.exists():
            write(model, SIZES[name])
        for what in options.only:
            given = [sys.executable, __file__, str(options.work), str(model), "--only", what, "--here"]
            row = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            size, grown, cpu, seconds = map(float, row.split())
            shutil.rmtree(out, ignore_errors=True)
            table.add([name, f"{size / 2**30:.2f}", what, f"{grown / 2**30:.2f}", f"{cpu:.1f}", f"{seconds:.1f}"])


if __name__ == "__main__":
    main()
