"""Two nodes of two ranks each on the loopback, started by `torchrun` as on a cluster, of which one can be killed in an event."""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.engine import shards
from billhook.engine.sharding import full_tensor
from kit.fits import trainer
from kit.ranks import ENDING
from kit.sharding import Own, sharding

SCRIPT = "from kit.nodes import fit\nfit()\n"
STEPS, STAGES = 7, [2, 5]
SECONDS = 420


def callback():
    return bh.KVHeadConversion([2, 1], at=STAGES, measure_batches=1)


def fit():
    """What each rank runs: a fit over both nodes, from a checkpoint if there is one."""
    folder, dies, path = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(SECONDS - 30, exit=True)  # what hangs says where
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if dies:
        die_in_the_last_event()
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    own, strategy = callback(), sharding(4, save_distributed_checkpoint=True)
    run = trainer(Path(folder), [own, saves], STEPS, devices=2, num_nodes=2, strategy=strategy, use_distributed_sampler=False)
    lit = Own(batch=4, nodes=2)
    run.fit(lit, ckpt_path=path)
    state = {name: full_tensor(value) for name, value in lit.state_dict().items()}
    if run.is_global_zero:
        torch.save([state, own.events], Path(folder, "end.pt"))


def die_in_the_last_event():
    """Kills this rank and what has started it, as a machine that goes down, when the model is to be sharded in its last shape."""
    events, restore, launcher = iter(STAGES), shards.restore_fsdp, os.getppid()

    def last(*given):
        if next(events) == STAGES[-1]:
            with suppress(ProcessLookupError):  # the node's other rank was faster
                os.kill(launcher, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        restore(*given)

    shards.restore_fsdp = last


def run_nodes(folder, dies=False, path=None):
    """Runs the fit on both nodes; returns how each of them ended, and what it said."""
    script = folder / "run.py"
    script.write_text(SCRIPT + ENDING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    start = ["--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", meet]
    here = os.pathsep.join([str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"PYTHONPATH": here, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    nodes = list[subprocess.Popen]()
    logs = [folder / f"node{node}.log" for node in range(2)]
    try:
        for node, log in enumerate(logs):
            own = [*start, "--local_addr", "127.0.0.1", "--rdzv_conf", f"is_host={int(node == 0)}", str(script)]
            told = json.dumps([str(folder), dies and node == 1, path and str(path)])
            command = [sys.executable, "-m", "torch.distributed.run", *own, told]
            with log.open("w") as file:
                nodes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        for node in nodes:
            with suppress(subprocess.TimeoutExpired):
                node.wait(SECONDS)
    finally:
        for node in nodes:
            node.kill()  # where it is still there; its ranks end themselves
            node.wait()
    return [(node.returncode, log.read_text()) for node, log in zip(nodes, logs, strict=True)]
