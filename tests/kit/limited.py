"""Prunes a model in processes that may take only so many bytes more than they have taken; run as a script: SOURCE OUT MORE."""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from transformers.models.llama import modeling_llama as modeling_llama  # once, and not in each process

from billhook.checkpoints.save import load, save
from billhook.model.streamed import stream
from billhook.sparsity.criteria import Magnitude
from billhook.sparsity.prune import prune
from kit.forked import forked

LIMITS = {"address space": (resource.RLIMIT_AS, "VmSize"), "data": (resource.RLIMIT_DATA, "VmData")}
WAYS = "streamed", "in memory"


def work(model, out):
    """What is done, and before the limit is set, too, as some things are imported late."""
    prune(model, Magnitude(), sparsity=0.5)
    save(model, out)


def taken(line):
    """The bytes that a line of the status of this process says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith(f"{line}:"))


def limited(source, out, limit, more, how):
    """Sets a limit, and works; what goes wrong is written beside."""
    with Path(f"{out}.txt").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    work(stream("tiny", f"{out}-before"), f"{out}-before")
    which, line = LIMITS[limit]
    most = taken(line) + more
    resource.setrlimit(which, (most, most))
    work(stream(source, out) if how == "streamed" else load(source), out)


def main(source, out, more):
    """Works in each way under each limit, and prints how that ended."""
    torch.set_num_threads(1)
    ended = {}
    for limit in LIMITS:
        for how in WAYS:
            folder = Path(out, limit, how)
            folder.parent.mkdir(exist_ok=True)
            ended[f"{limit}, {how}"] = forked(limited, source, folder, limit, int(more), how)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
