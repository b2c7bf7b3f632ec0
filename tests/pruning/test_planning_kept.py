"""What a plan promises can be carried out: what code does not follow is refused by the plan, before anything is trained."""

import copy

import pytest
import torch

import billhook as bh
from billhook.model.inputs import run_outputs
from billhook.units.gates import zero_units
from kit.removal import make as small


@pytest.mark.nightly
def test_what_a_model_has_computed_from_parameters_is_forgotten():
    model = small("levit")
    first = bh.plan(model, bh.importance.WeightNorm(), heads=0.34)
    run_outputs(model)  # in eval mode LeViT keeps its position biases of all heads
    bh.apply(model, first)
    assert sum(len(own) for own in first.units.values()) > 0


def test_readers_that_lose_outputs_themselves():
    """The router of Zaya is three linears in a row."""
    model = small("zaya")
    places = [name for name in bh.find_units(model, "channel") if "router" in name]
    before = copy.deepcopy(model)
    units = {name: [0, 3] for name in places}
    bh.pruning.prune_units(model, units, kind="channel")
    zero_units(before, units, "channel")
    torch.testing.assert_close(run_outputs(model), run_outputs(before))


def test_blocks_that_run_several_times():
    model = small("hrm_text")
    last = {name: [one.count() - 1] for name, one in bh.find_units(model, "block").items()}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="its weights are shared"):
        bh.pruning.plan_units(model, last, "block")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_trial_of_blocks_leaves_the_model_as_it_is():
    model = small("llama")
    before, config, modules = run_outputs(model), model.config.to_dict(), list(model.modules())
    bh.pruning.plan_units(model, [0], "block")
    assert model.config.to_dict() == config
    assert list(model.modules()) == modules
    torch.testing.assert_close(run_outputs(model), before, rtol=0, atol=0)
