"""A saved checkpoint is verified one block at a time: with no second model, for every family, and as strictly."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import billhook as bh
from billhook.checkpoints import save as saving
from billhook.checkpoints import verify as verifying
from kit.alive import Alive
from kit.families import build, llama

FAMILIES = ["llama", "gemma3_text", "phi", "mixtral", "qwen3_moe"]


@pytest.fixture
def no_second(monkeypatch):
    """Refuses to load a whole model."""
    monkeypatch.setattr(verifying, "load_as", lambda *_: pytest.fail("a second model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_model(no_second, family, tmp_path):
    assert bh.save(build(family), tmp_path / "a").difference == 0
    assert bh.save(bh.load(tmp_path / "a", "bfloat16"), tmp_path / "b").difference == 0


@pytest.mark.parametrize("place", [1, 5])
def test_wherever_weights_lie(no_second, place, tmp_path):
    model = llama()
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + place)
        parameter.data = room[place:].view(parameter.shape).normal_(0, 0.3)
    assert bh.save(model, tmp_path / "a").difference == 0


def test_a_shape_that_no_config_says(no_second, tmp_path):
    model = bh.load("tiny")
    bh.pruning.prune_units(model, {0: [0, 1]})
    assert (bh.save(model, tmp_path / "a").way, bh.load(tmp_path / "a").num_parameters()) == ("shaped", model.num_parameters())


def test_no_second_model_is_in_memory(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    with Alive() as alive:
        bh.save(model, tmp_path / "a")
    assert 0 < alive.most < 2 * block


@pytest.mark.parametrize("factor", [-1, 1.001])
def test_a_model_that_shares_what_it_has_with_its_checkpoint_stays_as_it_is(monkeypatch, factor, tmp_path):
    """The head that was written is another one: what is then compared, and changed to tell rounding, is a copy."""

    def change(model, draft):
        write(model, draft)
        for file in draft.glob("*.safetensors"):
            tensors = load_file(file)
            if "lm_head.weight" in tensors:
                tensors["lm_head.weight"] *= factor
                save_file(tensors, file, {"format": "pt"})

    llama().save_pretrained(tmp_path / "dense")
    model, write = bh.stream(tmp_path / "dense", tmp_path / "a"), saving._write_weights
    before = {name: one.clone() for name, one in model.state_dict().items() if not one.is_meta}
    monkeypatch.setattr(saving, "_write_weights", change)
    with pytest.raises(RuntimeError, match="the model was not saved, because the logits of the reloaded checkpoint differ by"):
        bh.save(model, tmp_path / "a")
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())


def spoilt(change):
    """Writes weights as `save` does, and then changes the file."""
    write = saving._write_weights

    def spoils(model, draft):
        write(model, draft)
        change(draft / "model.safetensors")

    return spoils


def one_weight(file):
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= -1
    save_file(tensors, file, {"format": "pt"})


def one_tensor(file):
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def half_a_file(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("change", [one_weight, one_tensor, half_a_file])
def test_a_broken_shard_is_found(monkeypatch, change, tmp_path):
    monkeypatch.setattr(saving, "_write_weights", spoilt(change))
    with pytest.raises(Exception, match=r"the logits of the reloaded checkpoint differ by|incomplete or broken|Error") as raised:
        bh.save(llama(), tmp_path / "a")
    assert raised.type is RuntimeError or change is half_a_file
    assert list(tmp_path.iterdir()) == []
