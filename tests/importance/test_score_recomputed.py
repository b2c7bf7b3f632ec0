"""Scores by gradients hold no more activations than the fit does: layers that it recomputes are recomputed for scores, too."""

import pytest
import torch

import billhook as bh
from kit.families import llama, tokens


@pytest.mark.parametrize(
    "importance", [bh.Taylor(), bh.Taylor("second"), bh.importance.GateGradient(), bh.importance.GateGradient("example")]
)
@pytest.mark.parametrize("training", [False, True])
def test_layers_are_recomputed_where_the_fit_does(importance, training):
    def scored(checkpointing):
        torch.manual_seed(0)
        model = llama(num_hidden_layers=4, attention_dropout=0.5).train(training)
        if checkpointing:
            model.activation_checkpointing_enable()
        heads, held = bh.find_units(model, "head"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (held.append(one.nbytes), one)[1], lambda one: one):
            found = bh.score(model, heads, importance, [{"input_ids": tokens(), "labels": tokens()}] * 2)
        assert "forward" not in vars(model.model.layers[0])
        return found, sum(held)

    (one, whole), (other, less) = scored(False), scored(True)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert less < whole / 2
