"""Numbers that a class derives from its config, as embeddings scaled by the root of the hidden size: weights make up for them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import billhook as bh
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.inputs import run_outputs
from kit.removal import make


class Holder(nn.Module):
    """A user's own module."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def cut_by_hand(model, plan):
    """The class built from a config with fewer hidden dimensions, with sliced weights and the scale of all of them."""
    config = copy.deepcopy(model.config)
    config.hidden_size -= len(next(iter(plan.units.values())))
    small = type(model)(config).eval().to(model.dtype)
    small.config._attn_implementation = model.config._attn_implementation
    state = model.state_dict()
    for (name, dim), stays in plan.cuts.items():
        state[name] = state[name].index_select(dim, torch.from_numpy(stays))
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    small.load_state_dict(state)
    small.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale
    return small


@pytest.mark.daily("gemma-True", "gemma3_text-False")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "vaultgemma"])
def test_scaled_embeddings(family, tied, tmp_path):
    """The cut model computes what the class would with the scale from before, and so does what is saved."""
    model = make(family, tie_word_embeddings=tied)
    plan = bh.plan(model, bh.importance.WeightNorm(), residual=0.25)
    reference = run_outputs(cut_by_hand(model, plan))
    bh.apply(model, plan)
    torch.testing.assert_close(run_outputs(model), reference, rtol=1e-5, atol=1e-5)
    saved = bh.save(model, tmp_path / "saved")
    assert saved.way == "plain"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    loaded.set_attn_implementation(model.config._attn_implementation)
    torch.testing.assert_close(run_outputs(loaded.eval()), reference, rtol=1e-5, atol=1e-5)


def test_a_lightning_checkpoint_gives_a_new_model_the_numbers_too():
    model = make("gemma")
    new = Holder(copy.deepcopy(model))
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), residual=0.25))
    checkpoint = {}
    save_shape(Holder(model), checkpoint)
    load_shape(new, checkpoint)
    new.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(run_outputs(new.model), run_outputs(model), rtol=0, atol=0)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["dots3_note_text", "longcat_flash"])
def test_what_no_weights_make_up_for_stays_as_the_config_says(family, tmp_path):
    """These scale low ranks by the hidden size: it stays in the config, and bh.load loads the shape."""
    model = make(family).float()
    plan = bh.plan(model, bh.importance.WeightNorm(), residual=0.25)
    bh.apply(model, plan)
    assert model.config.hidden_size == make(family).config.hidden_size
    attention = model.model.layers[0].self_attn
    scales = {name: value for name, value in vars(attention).items() if "lora_scale" in name}
    assert scales == {name: vars(make(family).model.layers[0].self_attn)[name] for name in scales}


def test_a_class_that_makes_positions_where_a_number_is(tmp_path):
    """Its constructor moves what it has made to the device of a single number."""
    model = make("wav2vec2-conformer").float()
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.25))
    assert bh.save(model, tmp_path / "saved").way == "plain"
