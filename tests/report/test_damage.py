"""Damage against plain computations, and what is warned of."""

import math

import pytest
import torch

from billhook.report import damage as module
from billhook.report.damage import Damage, Dense, table, warning_of
from billhook.running.batches import Batch
from kit.families import llama, tokens


def texts():
    torch.manual_seed(0)
    return [
        Batch({"input_ids": tokens(2, 12)}, "one"),
        Batch({"input_ids": tokens(3, 9)}, "two"),
        Batch({"input_ids": tokens(1, 12)}, "one"),
    ]


def losses(model, batches, source):
    rows = [row[None] for batch in batches if batch.source == source for row in batch["input_ids"]]
    return torch.stack([model(input_ids=row, labels=row).loss.double() for row in rows])


def predictions(model, batches, source):
    return [
        model(input_ids=row[None]).logits[0, :-1].softmax(-1) for b in batches if b.source == source for row in b["input_ids"]
    ]


@torch.no_grad()
def test_perplexity_and_divergence_of_each_text_with_paired_errors():
    dense, batches = llama(), texts()
    torch.manual_seed(1)
    changed = llama()
    found = Dense(dense, batches, inside=["two"]).damage(changed)
    assert [(one.source, one.inside, one.rows) for one in found] == [("one", False, 3), ("two", True, 3)]
    for one in found:
        before, after = losses(dense, batches, one.source), losses(changed, batches, one.source)
        assert one.before == pytest.approx(float(before.mean().exp()), rel=1e-5)
        assert one.after == pytest.approx(float(after.mean().exp()), rel=1e-5)
        error = float((after - before).std() / len(before) ** 0.5)
        assert one.ratio_error == pytest.approx(one.ratio * error, rel=1e-4)
        pairs = zip(predictions(dense, batches, one.source), predictions(changed, batches, one.source), strict=True)
        each = torch.stack([(p * (p.log() - q.log())).sum(-1).mean() for p, q in pairs])
        assert one.kl == pytest.approx(float(each.mean()), rel=2e-2)
        assert one.kl_error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=5e-2)


def test_few_predictions_are_held_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 2 * 64 * 6 * 2)
    model = llama()
    dense = Dense(model, texts())
    assert {tuple(row.predictions.shape) for row in dense.rows} == {(2, 64)}
    assert all(one.kl == pytest.approx(0, abs=1e-5) and one.ratio == 1 for one in dense.damage(model))


def one(source, ratio, inside, error=0.0):
    return Damage(source, inside, 10.0, 10.0 * ratio, error, 0.1, 0.01, 8)


def test_a_text_outside_that_loses_twice_as_much_is_warned_of():
    assert warning_of([one("in", 1.2, True), one("out", 1.4, False)]) is None
    assert warning_of([one("in", 1.2, True), one("out", 1.6, False, 0.3)]) is None  # by chance
    assert "out (1.60 times its perplexity)" in warning_of([one("in", 1.2, True), one("out", 1.6, False, 0.05)])
    assert warning_of([one("in", 0.9, True), one("out", 1.0, False)]) is None
    assert warning_of([one("out", 3.0, False)]) is None


def test_the_table_and_the_record():
    shown = table([one("in", 1.2, True, 0.05), one("out", 1.5, False, math.nan)])
    assert [row.split() for row in shown.splitlines()[2:]] == [
        ["in", "calibrated", "on", "10", "12", "1.200", "±", "0.050", "0.100", "±", "0.010"],
        ["out", "not", "calibrated", "on", "10", "15", "1.500", "0.100", "±", "0.010"],
    ]
    assert one("out", 1.5, False, math.nan).to_json()["ratio_error"] == "nan"
