"""Prunes a streamed model in processes that are killed at random; run as a script: SOURCE OUT STOPS."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import billhook as bh
from billhook.streaming.parts import Parts


def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 2048, (1, 64), generator=generator)} for _ in range(2)]


def work(source, out):
    """What is stopped, and goes on when it is called again."""
    model = bh.stream(source, out)
    bh.prune(model, bh.SparseGPT(), batches(), sparsity=0.5)
    bh.save(model, out)


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


def child(source, out):
    """Does the work in a process of its own; returns its number."""
    if number := os.fork():
        return number
    try:
        work(source, out)
    finally:
        os._exit(0)


def main(source, out, stops):
    """Stops the work so many times, each after a random while; each time that it is done, it begins again."""
    torch.set_num_threads(1)
    random.seed(0)
    start = time.monotonic()
    os.waitpid(child(source, f"{out}-straight"), 0)
    whole, stopped, resumed = time.monotonic() - start, 0, 0
    while stopped < stops:
        resumed += Path(out).with_name(f".{Path(out).name}.parts").exists()
        number = child(source, out)
        time.sleep(random.uniform(0, whole))
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        stopped += os.WIFSIGNALED(status)
        if Path(out).exists():
            bh.load(out)  # as a whole or not at all
    work(source, out)
    print(stopped, resumed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
