"""Ranks in threads, and two processes on the CPU, started as a user would start them."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from billhook.engine.comm import Comm
from kit.families import build
from kit.fits import data, trainer


class Ranks:
    """Runs a function on threads that sum tensors as ranks do; one that calls another number of times is an error."""

    def __init__(self, number):
        self.barrier = threading.Barrier(number, timeout=20)
        self.given = [None] * number

    def reduce(self, rank):
        def sums(tensor):
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            assert len({(one.shape, one.dtype) for one in self.given}) == 1
            total = sum(self.given[1:], self.given[0].clone())
            self.barrier.wait()
            return tensor.copy_(total)

        return Comm(sums, rank, len(self.given))

    def run(self, function):
        results, errors = {}, {}

        def target(rank):
            try:
                results[rank] = function(rank, self.reduce(rank))
            except Exception as error:
                errors[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(len(self.given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.compiler.set_stance("default")  # of all threads; each has put back what it found, in any order
        if errors:
            raise next((e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)), errors[min(errors)])
        return [results[rank] for rank in sorted(results)]


class FitOfTuples(pl.LightningModule):
    """A user's own module, on batches that are tuples; one process reads examples that two would read again, or leave out."""

    def __init__(self, kv_heads=4, examples=24, drop_last=False, family="llama"):
        super().__init__()
        torch.manual_seed(0)
        self.net = build(family, num_key_value_heads=kv_heads).train()
        self.examples, self.drop_last = examples, drop_last

    def train_dataloader(self):
        ids, ranks = draw(self.examples, 12), self.trainer.world_size
        sampler = partial(DistributedSampler, ids, 2, shuffle=False, drop_last=self.drop_last)
        if ranks == 2:
            return DataLoader(TensorDataset(ids), 1, sampler=sampler(self.trainer.global_rank))
        pairs = zip(sampler(0), sampler(1), strict=True)
        return DataLoader(TensorDataset(ids[[number for pair in pairs for number in pair]]), 2)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0], labels=batch[0]).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def draw(*size, seed=0):
    return torch.randint(3, 60, size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fit:
    """What is done by one process, and by two on the same global batches: of the text, or of the module's own."""

    module: Callable[[], pl.LightningModule]
    callback: Callable[[], Any]  # or a list of them
    told: Callable[[Any], Any]  # of the callbacks, the same on both
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    strategy: Callable[[], Any] = field(default=lambda: "ddp")
    resumed: Path | None = None  # a checkpoint

    def run(self, folder: Path, files: dict[str, str], ranks: int = 1) -> tuple[pl.Trainer, dict[str, torch.Tensor], Any]:
        torch.manual_seed(0)
        lit, callback = self.module(), self.callback()
        text = not isinstance(lit, FitOfTuples)
        two = {"devices": 2, "strategy": self.strategy(), "use_distributed_sampler": text} if ranks == 2 else {}
        run = trainer(folder, callback if isinstance(callback, list) else [callback], self.steps, **self.options, **two)
        run.fit(lit, data(files, batch_size=2 // ranks) if text else None, ckpt_path=self.resumed)
        return run, {name: value.detach() for name, value in lit.state_dict().items()}, self.told(callback)


def fit_all(fits: dict[str, Fit]) -> None:
    """What each of the two processes runs: all fits, and whether the outcome is the same on both."""
    files, out, names = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name, one in fits.items():
        if name not in names:
            continue
        run, *result = one.run(Path(out), files, ranks=2)
        gathered = [None, None]
        torch.distributed.all_gather_object(gathered, repr(tree_map_only(torch.Tensor, torch.Tensor.tolist, result)))
        if run.is_global_zero:
            torch.save([gathered[0] == gathered[1], *result], Path(out, f"{name}.pt"))


def asked_for(request, **others):
    """What the tests of a module that run call `name`, with these other parameters: a script does no more."""
    calls = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return sorted({call.params["name"] for call in calls if "name" in call.params and others.items() <= call.params.items()})


ENDING = "from kit.ranks import end\nend()\n"


def end():
    """Ends a rank whose work is done, once all others have done theirs, and before the interpreter would.

    Gloo's threads may release tensors while the interpreter ends, which aborts the process (pytorch/pytorch#190489).
    """
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):  # another one has left already
            torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_script(folder, text, arguments):
    """Runs a script as the first of two processes, which starts the other."""
    script = folder / "run.py"
    script.write_text(text + ENDING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "PYTHONWARNINGS": "ignore",
        "PYTHONHASHSEED": "3",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(arguments)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, last_words(done.stderr)


def last_words(told):
    """How what each rank and the launcher wrote ends; whose error came first is not said by the end alone."""
    of_ranks: dict[str, list[str]] = {}
    for line in told.splitlines():
        of_ranks.setdefault(line[: line.find(":")] if line.startswith("[rank") else "others", []).append(line[:300])
    return "\n".join(line for lines in of_ranks.values() for line in lines[-12:])


def outcome(folder, name):
    """The weights after a fit by two processes, and what its callback told."""
    alike, state, told = torch.load(folder / f"{name}.pt", weights_only=True)
    assert alike, "the ranks differ"
    return state, told
