"""The host waits for the device as often in a step with a callback as in one without."""

import pytest
import torch

import billhook as bh
from billhook.sparsity import masks
from kit import prunes
from kit.calls import Calls
from kit.events import Own, loader
from kit.families import llama
from kit.fits import trainer
from kit.syncs import Syncs, steps_counted

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


@pytest.mark.daily("held masks", "masked heads", "structure")
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_step_waits_for_nothing(tmp_path, plain, name, monkeypatch):
    make, events = CALLBACKS[name]
    monkeypatch.setattr(masks, "HOST", "none")  # what NumPy selects on a CPU does not count as a sync
    counted = steps(tmp_path, [make(tmp_path)])
    assert len(counted) == STEPS - 1
    for number, (now, before) in enumerate(zip(counted, plain, strict=True), start=1):
        assert number in events or not now - before, f"step {number}"


FINDINGS = {
    "structure": {"trace": 3, "units_of": 2, "shape_of": 15},  # to check, and to plan and carry out
    "KV heads": {"plan_kv_heads": 1, "trace": 2, "shape_of": 25},  # one plan checks the model, and is carried out
    "held masks": {"trace": 0, "shape_of": 7},
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_a_fit_finds_of_a_model_is_found_a_stated_number_of_times(tmp_path, name):
    make, _ = CALLBACKS[name]
    run = trainer(tmp_path, [make(tmp_path)], 4, limit_val_batches=0)
    with Calls() as calls:
        run.fit(Own(), loader(number=16), loader())
    assert calls.counts["zeros_of"] == 3  # at the beginning, before the event and after it
    for function, most in FINDINGS[name].items():
        assert calls.counts[function] <= most, function


class Asked(bh.KVHeadConversion):
    """Notes the steps after which the model's shape is asked whether a stage is done."""

    def __init__(self, **options):
        self.looks = []
        super().__init__(2, measure_batches=0, **options)

    def _reached(self, model):
        self.looks.append(model.trainer.global_step)
        return super()._reached(model)


@pytest.mark.parametrize(("options", "last"), [({"at": 2}, 2), ({"at": 4}, 4)])
def test_what_is_done_is_remembered(tmp_path, options, last):
    """The shape is asked for when training begins, and when a stage is due, and at no other step."""
    callback = Asked(**options)
    steps(tmp_path, [callback])
    assert max(callback.looks) == last
    assert callback.looks == sorted(set(callback.looks))
    assert len(callback.looks) <= 4


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


def test_zeros_are_read_once():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    with Syncs() as syncs:
        found = bh.summary(model)
    assert found.zeros == 3 * 32 + 32  # with the padding's embedding
    assert sum(number for place, number in syncs.places.items() if place.startswith("engine/zeros")) == 1
