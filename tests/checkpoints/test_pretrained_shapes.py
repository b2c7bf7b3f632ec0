"""Models of a shape that their class does not build, saved by whoever: the config says the shape from the cut or the load on."""

import json

import peft
import pytest
import torch

import billhook
from billhook.model.shape import KEY
from kit.families import llama, tokens
from kit.shaped import SHAPED, gpt2_of_two_heads, uneven_llama

CUTS = {
    "heads": lambda model: billhook.apply(
        model, billhook.pruning.plan_units(model, {"model.layers.0.self_attn": [0]}, per="kv_head")
    ),
    "channels": lambda model: billhook.apply(
        model, billhook.pruning.plan_units(model, {"model.layers.1.mlp": [0, 7, 9]}, kind="channel")
    ),
    "KV heads": lambda model: billhook.convert_kv_heads(model, 2, layers=[0]),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same(folder, model):
    model.eval()
    ids = tokens()
    with torch.no_grad():
        return torch.equal(billhook.load(folder)(ids).logits, model(ids).logits)


def lost(model, folder):
    """Saves a model and takes away what its config says."""
    billhook.save(model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config[KEY]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("cut", CUTS)
def test_from_the_cut_on(cut, tmp_path):
    model = llama()
    CUTS[cut](model)
    model.save_pretrained(tmp_path / "a")
    assert same(tmp_path / "a", model)


@pytest.mark.parametrize("family", SHAPED)
def test_from_the_load_on(family, tmp_path):
    model = SHAPED[family]()
    billhook.save(model, tmp_path / "a")
    billhook.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert same(tmp_path / "b", model)
    assert json.loads((tmp_path / "b" / "config.json").read_text())[KEY]


def test_a_cut_that_fails_leaves_the_config(monkeypatch):
    model = llama()
    plan = billhook.pruning.plan_units(model, {"model.layers.0.mlp": [0]}, kind="channel")
    monkeypatch.setattr("billhook.pruning.removal.outputs_match", lambda *_: False)
    with pytest.raises(ValueError, match="its forward pass does not work"):
        billhook.apply(model, plan)
    assert not hasattr(model.config, KEY)


def test_under_adapters_it_is_that_of_the_model_without_them(tmp_path):
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2))
    CUTS["heads"](adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "a")
    assert same(tmp_path / "a", merged)


@pytest.mark.parametrize(
    "build", [lambda: CUTS["heads"](model := llama()) or model, uneven_llama, SHAPED["bert"], gpt2_of_two_heads]
)
def test_sizes_that_the_config_has_lost_are_refused(build, tmp_path):
    lost(build(), tmp_path / "a")
    with pytest.raises(ValueError, match='tensor sizes differ from its config, which has no "billhook" entry'):
        billhook.load(tmp_path / "a")
