"""Models whose tensors hold no values, or may not be changed, are refused before anything is."""

import pytest
import torch

import billhook as bh
from kit.families import llama, tokens

BATCHES = [{"input_ids": tokens(4, 24)} for _ in range(2)]
CHANGES = {
    "heads": lambda model: bh.prune_units(model, {0: [0, 1]}),
    "blocks": lambda model: bh.prune_units(model, [1], kind="block"),
    "residual": lambda model: bh.apply(model, bh.plan(model, scores=scores(model, "residual"), residual=0.25)),
    "weights": lambda model: bh.prune(model, bh.Wanda(), BATCHES, 0.5),
    "kv_heads": lambda model: bh.convert_kv_heads(model, 1),
    "kv_heads by svd": lambda model: bh.convert_kv_heads(model, 1, "svd", BATCHES),
    "scores": lambda model: bh.score(model, bh.find_units(model, "head"), bh.Taylor(), BATCHES),
}


def scores(model, kind):
    return {name: torch.arange(float(one.count())) for name, one in bh.find_units(model, kind).items()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_made_in_inference_mode_is_refused_as_it_is(change, inside):
    with torch.inference_mode():
        model = llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        torch.inference_mode(inside),
        pytest.raises(ValueError, match=r"model: .* was made under torch\.inference_mode.*outside"),
    ):
        CHANGES[change](model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "scores"])
def test_a_model_that_is_changed_in_inference_mode_can_be_trained_later(change):
    model = llama()
    with torch.inference_mode():
        CHANGES[change](model)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()


def test_a_model_without_values_has_no_scores():
    model = llama().to("meta")
    with pytest.raises(ValueError, match=r"model: model.embed_tokens.weight has no weights yet .it is on the meta device.: load"):
        bh.score(model, bh.find_units(model, "head"), bh.WeightNorm())
