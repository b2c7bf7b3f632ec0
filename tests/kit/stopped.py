"""Prunes a streamed model in processes that are killed at random; run as a script: SOURCE OUT STOPS."""

import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.models.llama import modeling_llama as modeling_llama  # once, and not in each process that is stopped

from billhook.checkpoints.save import load, save
from billhook.engine.parts import Parts
from billhook.model.streamed import stream
from billhook.sparsity.prune import prune
from billhook.sparsity.sparsegpt import SparseGPT
from kit.forked import forked


def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 2048, (1, 64), generator=generator)} for _ in range(2)]


def work(source, out):
    """What is stopped, and goes on when it is called again."""
    model = stream(source, out)
    prune(model, SparseGPT(), batches(), sparsity=0.5)
    save(model, out)


def stop_after(blocks, monkeypatch):
    """Has writing stop when so many blocks are written; returns the names of what is written, and what lets it go on."""
    original, written, most = Parts.write, [], [blocks]

    def write(parts, name, tensors, note):
        if most == [len(written)]:
            raise KeyboardInterrupt
        written.append(name)
        original(parts, name, tensors, note)

    monkeypatch.setattr(Parts, "write", write)
    return written, most.clear


def whole(folder):
    """Loads what stands at a folder, which must be a whole checkpoint."""
    load(folder)


def ran(what, *arguments, seconds=None):
    """Runs something in a process of its own, stops it after so many seconds, and tells whether it was stopped.

    Everything runs in such processes: none may be made of one that has threads.
    """
    ended = forked(what, *arguments, seconds=120 if seconds is None else seconds)
    stopped = ended == -signal.SIGKILL
    assert ended == 0 or (stopped and seconds is not None), f"{what.__name__} ended with {ended}"
    return stopped


def main(source, out, stops):
    """Stops the work so many times, each after a random while; each time that it is done, it begins again."""
    torch.set_num_threads(1)
    random.seed(0)
    start = time.monotonic()
    ran(work, source, f"{out}-straight")
    most, stopped, resumed = time.monotonic() - start, 0, 0
    while stopped < stops:
        resumed += Path(out).with_name(f".{Path(out).name}.parts").exists()
        stopped += ran(work, source, out, seconds=random.uniform(0, most))
        if Path(out).exists():
            ran(whole, out)
    ran(work, source, out)
    print(stopped, resumed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
