"""Fields of configs, of those within configs too."""

import copy

import pytest
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from billhook.model.config_fields import configs_of, field, fields_of, nested_configs, set_fields, with_fields
from kit.families import llama


@pytest.fixture
def config():
    return LlavaConfig(text_config=LlamaConfig(hidden_size=24, num_attention_heads=4, num_hidden_layers=3).to_dict())


def test_fields_of_nested_configs_stand_behind_their_names(config):
    fields = fields_of(config)
    assert fields["text_config.hidden_size"] == 24
    assert fields["image_token_index"] == config.image_token_index
    assert not any(name.rpartition(".")[2].startswith("_") or name == "text_config" for name in fields)
    assert field(config, "text_config.num_hidden_layers") == 3
    assert field(config, "text_config.nothing") is None
    config.text_config.per_layer_config = {1: {"num_key_value_heads": 2}}
    assert field(config, "text_config.num_key_value_heads") is None


def test_fields_are_set_where_they_are(config):
    layers = ["a"]
    set_fields(config, {"text_config.hidden_size": 12, "projector_hidden_act": "silu", "text_config.names": layers})
    layers.append("b")
    assert (config.text_config.hidden_size, config.projector_hidden_act, config.text_config.names) == (12, "silu", ["a"])
    with pytest.raises(AttributeError):
        set_fields(config, {"nothing.hidden_size": 1})


def test_a_copy_with_other_fields_leaves_the_config_as_it_is(config):
    before = copy.deepcopy(config)
    assert with_fields(config, {"text_config.hidden_size": 12}).text_config.hidden_size == 12
    assert fields_of(config) == fields_of(before)


def test_configs_come_once_each_with_what_stands_before_their_fields(config):
    assert [(name, one) for name, one in nested_configs(config)] == [
        ("", config),
        *((f"{name}.", value) for name, value in vars(config).items() if name in ("text_config", "vision_config")),
    ]
    model, other = llama(), nn.Identity()
    other.config = config
    found = configs_of(nn.ModuleList([model, other]))
    assert {id(one) for one in found} == {id(one) for one in (model.config, config, config.text_config, config.vision_config)}
    assert len(found) == 4
