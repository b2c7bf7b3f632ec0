"""Prunes a model in processes that may take only so many bytes more than they have taken; run as a script: SOURCE OUT MORE."""

import json
import os
import resource
import sys
from contextlib import ExitStack, contextmanager
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
GROUP = "control group"
GROUPS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}


@contextmanager
def group(limit):
    """Makes a control group whose processes take so many bytes of memory at most; OSError where none can be made, or joined."""
    root, file = next(((root, file) for root, file in GROUPS.items() if Path(root, "cgroup.procs").exists()), (None, None))
    if root is None:
        raise OSError("there are no control groups")
    folder = Path(root, f"billhook-{os.getpid()}")
    folder.mkdir()
    try:
        if not (folder / file).exists():
            raise OSError(f"groups in {root} do not limit memory")
        (folder / file).write_text(str(limit))
        if forked(join, folder):
            raise OSError(f"groups in {root} cannot be joined")
        yield folder
    finally:
        folder.rmdir()


def join(folder):
    """Has this process, and those that it makes, be in a control group."""
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))


def work(model, out):
    """What is done, and before the limit is set, too, as some things are imported late."""
    prune(model, Magnitude(), sparsity=0.5)
    save(model, out)


def taken(line):
    """The bytes that a line of the status of this process says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith(f"{line}:"))


def limited(source, out, limit, more, how):
    """Sets a limit, or joins the control group of that folder, and works; what goes wrong is written beside."""
    with Path(f"{out}.txt").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    work(stream("tiny", f"{out}-before"), f"{out}-before")
    if limit in LIMITS:
        which, line = LIMITS[limit]
        most = taken(line) + more
        resource.setrlimit(which, (most, most))
    else:  # what was taken before does not count there
        join(limit)
    work(stream(source, out) if how == "streamed" else load(source), out)


def main(source, out, more):
    """Works in each way under each limit, and prints how that ended."""
    torch.set_num_threads(1)
    ended = {}
    with ExitStack() as stack:
        limits = {limit: limit for limit in LIMITS}
        try:
            limits[GROUP] = str(stack.enter_context(group(int(more))))
        except OSError as error:
            ended[GROUP] = str(error)
        for limit, given in limits.items():
            for how in WAYS:
                folder = Path(out, limit, how)
                folder.parent.mkdir(exist_ok=True)
                ended[f"{limit}, {how}"] = forked(limited, source, folder, given, int(more), how)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
