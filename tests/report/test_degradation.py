"""Degradation against plain computations, and what is warned of."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Batch
from billhook.report import predictions as module
from billhook.report.degradation import DenseReference, TextDegradation, degradation_table, degradation_warning
from kit.families import llama, tokens
from kit.ranks import Ranks


def texts():
    torch.manual_seed(0)
    return [
        Batch({"input_ids": tokens(2, 12)}, "one"),
        Batch({"input_ids": tokens(3, 9)}, "two"),
        Batch({"input_ids": tokens(1, 12)}, "one"),
    ]


def chances(model, ids):
    return model.double()(input_ids=ids[None]).logits[0, :-1].softmax(-1)


def of_source(model, batches, source):
    """Losses and predictions, row by row, in float64."""
    rows = [row for batch in batches if batch.source == source for row in batch["input_ids"]]
    each = [chances(copy.deepcopy(model), row) for row in rows]
    return torch.stack([-p.gather(1, row[1:, None]).log().mean() for p, row in zip(each, rows, strict=True)]), each


@torch.no_grad()
def test_perplexity_and_divergence_of_each_text_with_paired_errors():
    dense, batches = llama(), texts()
    torch.manual_seed(1)
    changed = llama()
    found = DenseReference(dense, batches, inside=["two"]).degradation(changed)
    assert [(one.source, one.inside, one.rows) for one in found] == [("one", False, 3), ("two", True, 3)]
    for one in found:
        before, dense_chances = of_source(dense, batches, one.source)
        after, now = of_source(changed, batches, one.source)
        assert one.before == pytest.approx(float(before.mean().exp()), rel=1e-6)
        assert one.after == pytest.approx(float(after.mean().exp()), rel=1e-6)
        assert one.ratio == pytest.approx(float((after - before).mean().exp()), rel=1e-6)
        error = float((after - before).std() / len(before) ** 0.5)
        assert one.ratio_error == pytest.approx(one.ratio * error, rel=1e-5)
        pairs = zip(dense_chances, now, strict=True)
        each = torch.stack([(p * (p.log() - q.log())).sum(-1).mean() for p, q in pairs])
        assert one.kl == pytest.approx(float(each.mean()), rel=1e-5)
        assert one.kl_error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-4)


def test_ranks_read_a_share_each_and_all_know_all():
    dense, batches, group = llama(), texts(), Ranks(2)
    torch.manual_seed(1)
    changed = llama()
    alone = DenseReference(dense, batches).degradation(changed)

    def of(rank, reduce):
        return DenseReference(copy.deepcopy(dense), batches, (), reduce).degradation(copy.deepcopy(changed))

    for one in group.run(of):
        assert repr(one) == repr(alone)


def test_what_is_kept_goes_on_with_the_same_model_and_tells_no_divergence_with_another():
    dense, batches = llama(), texts()
    torch.manual_seed(1)
    changed = llama()
    first = DenseReference(dense, batches, inside=["two"])
    expected, kept = first.degradation(changed), first.state_dict()
    again = DenseReference(dense, batches, inside=["one"])
    assert again.load_state_dict(kept)
    assert again.degradation(changed) == expected
    for other in (DenseReference(changed, batches), DenseReference(dense, batches[:2]), DenseReference(dense, texts()[::-1])):
        assert not other.load_state_dict(kept)
        for one, then in zip(other.degradation(changed), expected, strict=True):
            assert math.isnan(one.kl)
            assert replace(one, kl=then.kl, kl_error=then.kl_error) == then


def test_a_model_that_predicts_nothing_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no logits"):
        DenseReference(llama().model, texts())


def test_few_predictions_are_held_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 4 * 64 * 6 * 2)
    model = llama()
    dense = DenseReference(model, texts())
    assert {tuple(held.logs.shape) for held in dense._predictions.values()} == {(2, 64)}
    assert all(one.kl == pytest.approx(0, abs=1e-5) and one.ratio == 1 for one in dense.degradation(model))


def test_a_few_positions_at_a_time_say_the_same(monkeypatch):
    model, changed = llama(), llama()
    bh.prune(changed, bh.Magnitude(), sparsity=0.5)
    expected = DenseReference(model, texts()).degradation(changed)
    monkeypatch.setattr(module, "ELEMENTS", 3 * 64)
    for found, then in zip(DenseReference(model, texts()).degradation(changed), expected, strict=True):
        assert found.kl > 1e-6
        assert (found.before, found.after, found.kl) == pytest.approx((then.before, then.after, then.kl), rel=1e-5)


def one(source, ratio, inside, error=0.0):
    return TextDegradation(source, inside, 10.0, 10.0 * ratio, error, 0.1, 0.01, 8)


def test_a_text_outside_that_loses_twice_as_much_is_warned_of():
    assert degradation_warning([one("in", 1.2, True), one("out", 1.4, False)]) is None
    assert degradation_warning([one("in", 1.2, True), one("out", 1.6, False, 0.3)]) is None  # by chance
    assert "out (1.60x perplexity)" in degradation_warning([one("in", 1.2, True), one("out", 1.6, False, 0.05)])
    assert (
        degradation_warning([one("in", 1.2, True, 0.2), one("out", 1.6, False, 0.05)]) is None
    )  # what is inside may have lost as much
    assert degradation_warning([one("in", 0.9, True), one("out", 1.0, False)]) is None
    assert degradation_warning([one("in", 0.972, True, 0.018), one("out", 1.085, False, 0.038)]) is None
    assert "degraded and the calibration texts did not: out (1.09x" in degradation_warning(
        [one("in", 0.97, True, 0.01), one("out", 1.09, False, 0.01)]
    )
    assert degradation_warning([one("in", 0.97, True, math.nan), one("out", 1.09, False)]) is None  # of one row nothing is known
    assert degradation_warning([one("out", 3.0, False)]) is None


def test_the_table_and_the_record():
    shown = degradation_table([one("in", 1.2, True, 0.05), one("out", 1.5, False, math.nan)])
    assert [row.split() for row in shown.splitlines()[2:]] == [
        ["in", "calibrated", "on", "10", "12", "1.200", "±", "0.050", "0.100", "±", "0.010"],
        ["out", "not", "calibrated", "on", "10", "15", "1.500", "0.100", "±", "0.010"],
    ]
    assert one("out", 1.5, False, math.nan).to_json()["ratio_error"] == "nan"
    again = TextDegradation.from_json(one("out", 1.5, False, math.nan).to_json())
    assert repr(again) == repr(one("out", 1.5, False, math.nan))
    assert degradation_table([replace(again, kl=math.nan)]).split()[-1] == "unknown"
