"""The smallest model that loses no more than asked: it does, and the next smaller one does not."""

import math
from functools import cache

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Batch, run_with_loss
from billhook.shrinking import selection as module
from billhook.shrinking.divergence import Perplexity, split_batches
from kit import shrinks
from kit.families import llama, tokens


def sure():
    """A Llama whose predictions suffer when it is cut."""
    torch.manual_seed(1)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(10)
    return model


@cache
def texts():
    """What it writes itself, which it predicts as well as can be."""
    torch.manual_seed(0)
    ids = sure().generate(tokens(36, 4), max_new_tokens=16, min_new_tokens=16, do_sample=True, top_k=0)
    return [Batch({"input_ids": own}, name) for own, name in zip(ids.split(6), ("one", "two") * 3, strict=True)]


@torch.no_grad()
def loss(model, batch):
    return float(model(batch["input_ids"], labels=batch["input_ids"]).loss)


def rises(model, dense, batches):
    """Perplexity to the dense model's, the geometric mean over sources."""
    by_source = {}
    for batch in batches:
        by_source.setdefault(batch.source, []).append(loss(model, batch) - loss(dense, batch))
    return math.exp(sum(sum(own) / len(own) for own in by_source.values()) / len(by_source))


def test_the_ratio_of_perplexities():
    model, dense, batches = sure(), sure(), [*texts()[:3], Batch({"input_ids": tokens(2, 9)}, "three")]
    perplexity = Perplexity(model, [run_with_loss(model, {}, batch) for batch in batches])
    assert perplexity.ratio() == 1
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.2)
    assert perplexity.ratio() == pytest.approx(rises(model, dense, batches), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity.ratio() == math.inf


@pytest.mark.daily("free-cut")
@pytest.mark.parametrize("repair", [bh.RepairConfig(), None], ids=["repaired", "cut"])
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_it_is_met_and_the_next_smaller_size_does_not_meet_it(layers, repair, monkeypatch):
    monkeypatch.setattr(module, "SIZES", 16)
    model, dense, held_out = sure(), sure(), split_batches(texts())[1]
    options = {"layers": layers, "repair": repair, "generations": 1, "candidates": 2}
    shrunk = shrinks.shrink(model, texts(), max_loss=1.1, **options)
    assert shrunk.ratio == pytest.approx(rises(model, dense, held_out), rel=1e-4)
    assert shrunk.ratio <= 1.1
    assert (shrunk.target, shrunk.left) == ("params", model.num_parameters())
    assert shrunk.left <= shrunk.limit < dense.num_parameters()
    assert "x the dense model's" in str(shrunk)
    least = shrunk.curve[0].left
    step = math.ceil((dense.num_parameters() - least) / 16)
    other = sure()
    smaller = shrinks.shrink(other, texts(), params=shrunk.limit - 3 * step, **options)  # whose levels fit its size
    assert rises(other, dense, held_out) > 1.1
    assert smaller.left < shrunk.left


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_loss": 1.0}, "max_loss=1.0 must be a number above 1"),
        ({"max_loss": 1.1, "params": 0.8}, "exactly one of .*; got params and max_loss"),
        ({"max_loss": 1 + 1e-12}, r"max_loss=1.0+1 is out of reach: a model of [\d,]+ parameters already"),
    ],
)
def test_what_is_refused_changes_nothing(given, says):
    model = sure()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        shrinks.shrink(model, texts(), generations=0, repair=None, importance=bh.importance.WeightNorm(), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_losses_that_are_not_finite_are_refused():
    model = sure()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the loss of this LlamaForCausalLM is NaN or infinite"):
        Perplexity(model, [run_with_loss(model, {}, batch) for batch in texts()])
