"""Two processes on the CPU, each started as a user would: a script under the DDP strategy."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from fits import data, module, trainer

from billhook import KVHeadConversion

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


@pytest.mark.parametrize(("heads", "at"), [(2, "start"), ([2, 1], [2, 4])])
def test_two_processes_equal_one_on_the_same_global_batches(files, tmp_path, heads, at):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "MASTER_PORT": port,
        "PYTHONPATH": os.path.dirname(__file__),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    arguments = json.dumps([files, str(tmp_path), heads, at])
    done = subprocess.run([sys.executable, str(script), arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

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
