"""The host waits for the device as often in a step with a callback as in one without."""

import pytest

import billhook as bh
from billhook.sparsity import masks
from kit import prunes
from kit.events import Own, loader
from kit.fits import trainer
from kit.syncs import steps_counted

pytestmark = pytest.mark.nightly
FEW = {"calibration": 4, "measure_batches": 0}
STEPS = 7
# each with the steps of its events
CALLBACKS = {
    "held masks": (lambda folder: prunes.WeightPruning(sparsity=0.5, at=1, **FEW), [1]),
    "KV heads": (lambda folder: bh.KVHeadConversion(2, at=3, measure_batches=0), [3]),
    "masked heads": (lambda folder: bh.HeadPruning(0.5, at=1, remove="never", **FEW), [1]),
    "structure": (lambda folder: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **FEW), [2]),
    "depth": (lambda folder: bh.DepthPruning(1, at=2, **FEW), [2]),
    "report": (lambda folder: bh.Report(), []),
    "export": (lambda folder: bh.Export(str(folder)), [1]),
}


def steps(folder, callbacks):
    run = trainer(folder, callbacks, STEPS, limit_val_batches=0)
    with steps_counted(run) as counted:
        run.fit(Own(), loader(number=16), loader())
    return counted


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What is counted in each step without a callback."""
    return steps(tmp_path_factory.mktemp("plain"), [])


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_step_waits_for_nothing(tmp_path, plain, name, monkeypatch):
    make, events = CALLBACKS[name]
    monkeypatch.setattr(masks, "HOST", "none")  # what NumPy selects on a CPU does not count as a sync
    counted = steps(tmp_path, [make(tmp_path)])
    assert len(counted) == STEPS - 1
    for number, (now, before) in enumerate(zip(counted, plain, strict=True), start=1):
        assert number in events or not now - before, f"step {number}"
