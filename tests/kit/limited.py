"""Prunes a model in a process that may take only so many bytes more than it has taken: SOURCE OUT LIMIT MORE HOW."""

import resource
import sys
from pathlib import Path

import torch

import billhook as bh

LIMITS = {"address space": (resource.RLIMIT_AS, "VmSize"), "data": (resource.RLIMIT_DATA, "VmData")}


def work(model, out):
    """What is done, and before the limit is set, too, as some things are imported late."""
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    bh.save(model, out)


def taken(line):
    """The bytes that a line of the status of this process says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith(f"{line}:"))


def main(source, out, limit, more, how):
    """Sets a limit, and works."""
    torch.set_num_threads(1)
    work(bh.stream("tiny", f"{out}-before"), f"{out}-before")
    which, line = LIMITS[limit]
    before = taken(line)
    resource.setrlimit(which, (before + int(more), before + int(more)))
    work(bh.stream(source, out) if how == "streamed" else bh.load(source), out)
    print(before)


if __name__ == "__main__":
    main(*sys.argv[1:])
