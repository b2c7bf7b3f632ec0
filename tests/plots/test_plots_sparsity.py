"""The picture of zeros by linear, against the weights that it is drawn from."""

import numpy as np
import pytest
import torch
from torch import nn

import billhook as bh
from billhook import plots
from kit.families import llama


def table(figure):
    return np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def test_a_plan_is_drawn_as_the_model_is_once_it_is_carried_out():
    model = llama()
    plan = bh.prune(model, bh.Magnitude(compares="global"), sparsity=0.3, dry_run=True)
    planned = table(plots.sparsity(plan))
    bh.apply(model, plan)
    figure = plots.sparsity(model)
    assert np.allclose(table(figure), planned)
    rows = labels(figure.axes[0].get_yticklabels())
    for block, layer in enumerate(model.model.layers):
        share = (layer.self_attn.v_proj.weight == 0).float().mean().item()
        assert planned[rows.index("self_attn.v_proj"), block] == pytest.approx(share, abs=1e-6)
    assert figure.axes[0].get_title().startswith("30.0% of ")
    assert len(figure.axes[0].texts) == planned.size


def test_experts_of_a_block_are_taken_together_and_a_linear_in_no_block_is_at_the_right():
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(2, 4)})
    with torch.no_grad():
        block["experts"][0].weight.zero_()
        model["head"].weight[0] = 0
    figure = plots.sparsity(model)
    assert labels(figure.axes[0].get_xticklabels()) == ["0", "none"]
    np.testing.assert_equal(table(figure), [[0.5, np.nan], [np.nan, 0.25]])
    assert figure.axes[0].get_title() == "37.5% of 16 weights are zero"


@pytest.mark.parametrize(("of", "told"), [("tiny", "of='tiny' must be"), (nn.ReLU(), "it has no linear layers")])
def test_what_has_no_linears_is_refused(of, told):
    with pytest.raises(ValueError, match=told):
        plots.sparsity(of)
