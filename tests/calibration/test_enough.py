"""When a choice is settled: against a choice whose noise is known, and in a plan."""

import pytest
import torch

import billhook as bh
from billhook.calibration.enough import interleaved, settle
from billhook.running.batches import Batch
from kit.families import llama, tokens


def chooser(noise, seen):
    """The 50 lowest of 200 scores, seen through the mean of so many batches."""
    true = torch.arange(200.0)

    def choose(batches):
        seen.append(len(batches))
        found = true + noise * torch.stack([batch["noise"] for batch in batches]).mean(0)
        return {"place": found.argsort()[:50].tolist()}

    return choose


def batches(number):
    torch.manual_seed(0)
    return [Batch({"noise": torch.randn(200)}, "one") for _ in range(number)]


def test_it_ends_when_halves_and_doublings_agree():
    seen = []
    used, settled = settle(chooser(10.0, seen), batches(512), 0.95)
    assert settled.batches == len(used) < 512
    assert min(settled.halves, settled.doubling) >= 0.95
    assert seen[:5] == [4, 8, 4, 16, 8]
    assert sum(seen) <= 3 * len(used) + 4
    fewer, _ = settle(chooser(0.1, []), batches(512), 0.95)
    assert len(fewer) == 8


def test_there_may_not_be_enough():
    used, settled = settle(chooser(1000.0, []), batches(40), 0.99)
    assert len(used) == settled.batches == settled.of == 40
    assert settled.halves < 0.99


def test_the_first_batches_are_of_all_sources():
    given = [Batch({"number": number}, "one") for number in range(6)] + [Batch({"number": number}, "two") for number in range(3)]
    assert [one.source for one in interleaved(given)] == ["one", "two", "one"] * 3
    assert [one["number"] for one in interleaved(given) if one.source == "one"] == list(range(6))


def test_a_plan_says_what_it_took(monkeypatch):
    model = llama()
    given = [Batch({"input_ids": tokens(1, 32)}, "one") for _ in range(12)]
    monkeypatch.setattr(bh.Calibration, "read", lambda self, model: given)
    plan = bh.plan(model, bh.OutputNorm(), bh.Calibration(enough=0.5), channels=0.5)
    assert f"{plan.settled.batches} of 12 batches: two halves agree on" in str(plan)
    used = interleaved(given)[: plan.settled.batches]
    assert bh.plan(model, bh.OutputNorm(), used, channels=0.5).units == plan.units
    assert bh.plan(model, bh.OutputNorm(), bh.Calibration(), channels=0.5).settled is None


def test_refused():
    with pytest.raises(ValueError, match=r"enough=0.0 must be in \(0, 1\]"):
        bh.Calibration(enough=0.0)
