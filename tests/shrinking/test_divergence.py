"""The divergence against plain sums of probabilities."""

import pytest
import torch

from billhook.report import predictions as module
from billhook.running.batches import Batch, runs_of
from billhook.shrinking.divergence import Divergence
from kit.families import llama, tokens


def change(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.5 * torch.randn(64, 32))


@torch.no_grad()
def chances(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found = model(**inputs).logits.softmax(-1)
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found.flatten(0, 1)


def test_divergence_by_source_of_positions_that_count():
    model = llama()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    batches = [Batch({"input_ids": tokens(), "attention_mask": mask}, "one"), Batch({"input_ids": tokens(3, 9)}, "two")]
    dense = [chances(model, batch) for batch in batches]
    found = Divergence(model, runs_of(model, batches))
    assert found.mean() == pytest.approx(0, abs=1e-5)
    change(model)
    expected = []
    for batch, before in zip(batches, dense, strict=True):
        expected.append(float((before * (before.log() - chances(model, batch).log())).sum(-1).mean()))
        assert found.by_source()[batch.source] == pytest.approx(expected[-1], rel=1e-4)
    assert found.mean() == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_few_positions_are_held_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 4 * 64 * 5 * 2)
    model = llama()
    found = Divergence(model, runs_of(model, [{"input_ids": tokens()} for _ in range(2)]))
    assert {len(held.positions) for _, held in found._held} == {5}


def test_a_model_that_predicts_nothing_is_refused():
    model = llama().model
    with pytest.raises(ValueError, match="predicts nothing"):
        Divergence(model, runs_of(model, [{"input_ids": tokens()}]))
