"""The divergence against plain sums of probabilities."""

import pytest
import torch

from billhook.engine.batches import Batch, runs_of
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


def test_a_model_that_predicts_nothing_is_refused():
    model = llama().model
    with pytest.raises(ValueError, match="has no logits"):
        Divergence(model, runs_of(model, [{"input_ids": tokens()}]))


def test_blocks_before_the_first_changed_one_are_not_run_again():
    model = llama(num_hidden_layers=3)
    runs = runs_of(model, [Batch({"input_ids": tokens()}, "one"), Batch({"input_ids": tokens(3, 9)}, "two")])
    found = Divergence(model, runs)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    calls = []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    short = found.by_source(["model.layers.1.mlp"])
    assert calls == [1, 2] * 2
    calls.clear()
    assert found.by_source() == short
    assert min(short.values()) > 0
    assert calls == [0, 1, 2] * 2
    calls.clear()
    found.mean(["model.layers.1.mlp", "lm_head"])
    assert calls == [0, 1, 2] * 2


def test_models_whose_blocks_hand_on_more_than_they_return_run_as_a_whole():
    model, shared = llama(num_hidden_layers=2), []
    model.model.layers[0].register_forward_hook(lambda *own: shared.append(own[2]))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: shared.clear())
    model.model.layers[1].register_forward_hook(lambda *own: own[2] + shared[0])
    model.model.layers[0].mlp.register_forward_hook(lambda *own: shared.append(own[2]))
    found = Divergence(model, runs_of(model, [{"input_ids": tokens()}]))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    assert found.by_source(["model.layers.1.mlp"]) == found.by_source()
