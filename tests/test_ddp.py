"""Two processes on the CPU, each started as a user would: a script under the DDP strategy."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from families import llama
from fits import data, module, trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from billhook import (
    HeadPruning,
    KVHeadConversion,
    Linear,
    MultiStep,
    Repair,
    StructuredPruning,
    Taylor,
    WeightPruning,
)  # fmt: skip

SCRIPT = textwrap.dedent("""
    import json, sys
    import lightning.pytorch as pl
    import torch
    from fits import data, module, trainer
    from billhook import KVHeadConversion

    files, out, heads, at = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    lit = module()
    callback = KVHeadConversion(heads, at)
    options = dict(devices=2, strategy="ddp", val_check_interval=3, check_val_every_n_epoch=None, limit_val_batches=4)
    run = trainer(out, [callback], max_steps=6, **options)
    run.fit(lit, data(files, batch_size=1))
    state = {name: value.detach() for name, value in lit.state_dict().items()}
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, {n: v.tolist() for n, v in state.items()})
    assert gathered[0] == gathered[1], "the ranks differ"
    if run.is_global_zero:
        torch.save(state, f"{out}/state.pt")
        json.dump(callback.events, open(f"{out}/events.json", "w"))
""")


def run_script(folder, text, arguments):
    """Runs a script as the first of two processes, which starts the other."""
    script = folder / "run.py"
    script.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "MASTER_PORT": port,
        "PYTHONPATH": os.path.dirname(__file__),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("heads", "at"), [(2, "start"), ([2, 1], [2, 4])])
def test_two_processes_equal_one_on_the_same_global_batches(files, tmp_path, heads, at):
    run_script(tmp_path, SCRIPT, [files, str(tmp_path), heads, at])
    single, callback = module(), KVHeadConversion(heads, at)
    one = trainer(tmp_path, [callback], max_steps=6, val_check_interval=3, check_val_every_n_epoch=None, limit_val_batches=4)
    one.fit(single, data(files, batch_size=2))
    for name, value in torch.load(tmp_path / "state.pt", weights_only=True).items():
        torch.testing.assert_close(
            value, single.state_dict()[name], atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    events = json.loads((tmp_path / "events.json").read_text())
    assert [e["step"] for e in events] == [e["step"] for e in callback.events]
    for two, one_device in zip(events, callback.events, strict=True):
        for when in ("before", "after"):
            assert two[when] == pytest.approx(one_device[when], rel=2e-3)


PRUNING = textwrap.dedent("""
    import json, sys
    import torch
    from fits import data, module, trainer
    from test_ddp import FitOfTuples, ramp
    from billhook import WeightPruning

    files, out, kind = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lit = FitOfTuples() if kind == "tuples" else module()
    callback = WeightPruning(sparsity=ramp(), examples=7, measure_batches=2)
    run = trainer(out, [callback], max_steps=6, devices=2, strategy="ddp", accumulate_grad_batches=2,
                  use_distributed_sampler=kind != "tuples")
    run.fit(lit, None if kind == "tuples" else data(files, batch_size=1))
    state = {name: value.detach() for name, value in lit.state_dict().items()}
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, [{n: v.tolist() for n, v in s.items()} for s in (state, callback.masks)])
    assert gathered[0] == gathered[1], "the ranks differ"
    if run.is_global_zero:
        torch.save([state, callback.masks, callback.events], f"{out}/result.pt")
""")


def ramp():
    return Linear(final=0.5, start=1, end=5, every=2)


class FitOfTuples(pl.LightningModule):
    """A user's own module, on batches that are tuples."""

    def __init__(self, kv_heads=4):
        super().__init__()
        torch.manual_seed(0)
        self.net = llama(num_key_value_heads=kv_heads).train()

    def train_dataloader(self):
        ids, ranks = torch.randint(3, 60, (24, 12), generator=torch.Generator().manual_seed(0)), self.trainer.world_size
        sampler = DistributedSampler(ids, ranks, self.trainer.global_rank, shuffle=False) if ranks > 1 else None
        return DataLoader(TensorDataset(ids), 2 // ranks, sampler=sampler)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0], labels=batch[0]).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", ["tuples", "text"])
def test_two_processes_prune_as_one_does(files, tmp_path, kind):
    run_script(tmp_path, PRUNING, [files, str(tmp_path), kind])
    state, masks, events = torch.load(tmp_path / "result.pt", weights_only=True)
    single = FitOfTuples() if kind == "tuples" else module()
    callback = WeightPruning(sparsity=ramp(), examples=7, measure_batches=2)
    one = trainer(tmp_path, [callback], max_steps=6, accumulate_grad_batches=2)
    one.fit(single, None if kind == "tuples" else data(files, batch_size=2))
    assert [(e["step"], e["after"]["sparsity"]) for e in events] == [(e["step"], e["after"]["sparsity"]) for e in callback.events]
    assert len(masks) == 14
    for name, mask in callback.masks.items():
        assert (mask == masks[name]).float().mean() >= 0.99, name
    prefix = "net." if kind == "tuples" else "model."
    for name, mask in masks.items():
        both = mask & callback.masks[name]
        values = [found[f"{prefix}{name}.weight"] for found in (state, single.state_dict())]
        assert not values[0][~mask].any()
        torch.testing.assert_close(values[0][both], values[1][both], atol=2e-3, rtol=1e-2)


HEADS = textwrap.dedent("""
    import json, sys
    import torch
    from fits import trainer
    from test_ddp import FitOfTuples, head_pruning

    out, remove, given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    lit, callback = FitOfTuples(8), head_pruning(remove, given)
    run = trainer(out, [callback], max_steps=6, devices=2, strategy="ddp", use_distributed_sampler=False)
    run.fit(lit)
    state = {name: value.detach() for name, value in lit.state_dict().items()}
    record = callback.record.state_dict()
    gathered = [None, None]
    mine = [{n: v.tolist() for n, v in s.items()} for s in (state, record["scores"])] + [record["numbers"], callback.heads]
    torch.distributed.all_gather_object(gathered, repr(mine))
    assert gathered[0] == gathered[1], "the ranks differ"
    if run.is_global_zero:
        torch.save([state, record, callback.heads, callback.events], f"{out}/result.pt")
""")


def head_pruning(remove, given):
    """With batches of the user's own, two to a process, or ten examples of the training data."""
    ids = torch.randint(3, 60, (4, 2, 12), generator=torch.Generator().manual_seed(1))
    options = {"calibration": [(one,) for one in ids], "importance": Taylor("first")} if given else {"examples": 10}
    return HeadPruning(MultiStep([0.25, 0.5], [2, 4]), remove=remove, measure_batches=0, **options)


@pytest.mark.parametrize(("remove", "given"), [("rounds", False), ("end", True)])
def test_two_processes_prune_the_heads_that_one_does(tmp_path, remove, given):
    run_script(tmp_path, HEADS, [str(tmp_path), remove, given])
    state, record, heads, events = torch.load(tmp_path / "result.pt", weights_only=True)
    single, callback = FitOfTuples(8), head_pruning(remove, given)
    trainer(tmp_path, [callback], max_steps=6).fit(single)
    assert events == callback.events
    assert heads == callback.heads
    assert record["numbers"] == callback.record.numbers
    for name, scores in callback.record.scores.items():
        torch.testing.assert_close(record["scores"][name], scores, rtol=1e-3, atol=1e-5, equal_nan=True)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=2e-4, rtol=1e-3)


STRUCTURE = textwrap.dedent("""
    import json, sys
    import torch
    from fits import trainer
    from test_ddp import FitOfTuples, structured_pruning

    (out,) = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    lit, callback = FitOfTuples(), structured_pruning()
    run = trainer(out, [callback], max_steps=6, devices=2, strategy="ddp", use_distributed_sampler=False)
    run.fit(lit)
    state = {name: value.detach() for name, value in lit.state_dict().items()}
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, repr([{n: v.tolist() for n, v in state.items()}, callback.events]))
    assert gathered[0] == gathered[1], "the ranks differ"
    if run.is_global_zero:
        torch.save([state, callback.events], f"{out}/result.pt")
""")


def structured_pruning():
    """In two events, on batches of the user's own, of which one process chooses the ridge on those that two do."""
    ids = torch.randint(3, 60, (6, 4, 12), generator=torch.Generator().manual_seed(1))[[0, 1, 2, 3, 2, 4, 4, 5]]
    options = {"calibration": [(one,) for one in ids], "importance": Taylor("first"), "repair": Repair(), "measure_batches": 0}
    return StructuredPruning(channels=0.5, kv_heads=0.5, at=MultiStep([0.5, 1.0], [2, 4]), **options)


def test_two_processes_cut_and_repair_what_one_does(tmp_path):
    run_script(tmp_path, STRUCTURE, [str(tmp_path)])
    state, events = torch.load(tmp_path / "result.pt", weights_only=True)
    single, callback = FitOfTuples(), structured_pruning()
    trainer(tmp_path, [callback], max_steps=6).fit(single)
    assert events == callback.events
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in single.state_dict().items()}
    for name, value in single.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=2e-3, rtol=1e-2)
