"""The host waits for the device as often in a step with a callback as in one without."""

import pytest
import torch

import billhook as bh
from billhook.sparsity import masks
from kit import prunes
from kit.events import Own, loader
from kit.families import llama
from kit.fits import trainer
from kit.syncs import Syncs, steps_counted

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


@pytest.mark.filterwarnings("ignore:Repair uses a single source")
@pytest.mark.parametrize(("importance", "most"), [(bh.OutputNorm(), 24), (bh.Taylor(), 48), (bh.OBS(), 24)], ids=repr)
def test_an_event_waits_a_stated_number_of_times_for_each_module(importance, most):
    model, mask = llama(), torch.ones(8, 12, dtype=torch.int64)
    mask[:2, -3:] = 0
    batches = [{"input_ids": torch.randint(3, 60, (8, 12)), "attention_mask": mask.clone()} for _ in range(4)]
    with Syncs() as scoring:
        plan = bh.plan(model, importance, batches, channels=0.5)
    with Syncs() as repairing:
        bh.repair(model, plan, batches)
    assert 0 < scoring.total <= most * len(plan.units)
    own = sum(number for place, number in repairing.places.items() if not place.startswith("engine/batches"))  # the model's
    assert 0 < own <= 20 * len(plan.units)
