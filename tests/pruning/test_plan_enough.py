"""Plans on as many batches of a calibration as are enough say what it took."""

import pytest

import billhook as bh
from billhook.calibration.enough import interleaved
from billhook.engine.batches import Batch
from kit.families import llama, tokens


@pytest.fixture
def given(monkeypatch):
    batches = [Batch({"input_ids": tokens(1, 32)}, "one") for _ in range(12)]
    monkeypatch.setattr(bh.Calibration, "read", lambda self, model: batches)
    return batches


def test_units(given):
    model = llama()
    plan = bh.plan(model, bh.OutputNorm(), bh.Calibration(enough=0.3), channels=0.5)
    assert plan.settled.batches == 6
    assert f"chosen on 6 of 12 batches: two halves agree on {100 * plan.settled.halves:.4g}%" in str(plan)
    assert bh.plan(model, bh.OutputNorm(), interleaved(given)[:6], channels=0.5).units == plan.units
    assert bh.plan(model, bh.OutputNorm(), bh.Calibration(), channels=0.5).settled is None
    short = bh.plan(model, bh.OutputNorm(), bh.Calibration(enough=1.0), channels=0.5)
    assert "chosen on 12 of 12 batches, which do not settle it (asked for was 100%)" in str(short)
    assert bh.Plan.from_json(short.to_json(), model).units == short.units


def test_blocks(given):
    model = llama()
    plan = bh.plan(model, batches=bh.Calibration(enough=1.0), blocks=1)
    assert str(plan).splitlines()[-1] == f"  {plan.settled}"
    assert plan.settled.of == 12
    assert "settled" not in plan.to_json()
    assert bh.Plan.from_json(plan.to_json(), model) == plan
    with pytest.raises(ValueError, match=r"enough=1.0: in greedy order each block is chosen on all examples: leave it out"):
        bh.plan(model, batches=bh.Calibration(enough=1.0), blocks=1, greedy=True)
