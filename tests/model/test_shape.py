import copy
import json

import pytest
import torch
import transformers
from torch import nn

from billhook.kv_heads.convert import convert_kv_heads
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.config_fields import build_on_meta
from billhook.model.find import find_transformer, locate_transformer
from billhook.model.shape import Shape, set_shape, shape_beyond_config, shape_of
from kit.families import build, llama, tokens
from kit.kv_zoo import build as build_kv
from kit.shaped import PLAIN, SHAPED


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_a_shape_goes_both_ways_and_weights_of_it_then_load(family):
    dense, other = build(family), build(family)
    small = copy.deepcopy(dense)
    convert_kv_heads(small, 1)
    for target in (small, dense, small):
        set_shape(other, shape_of(target))
        other.load_state_dict(target.state_dict())
        ids = tokens()
        assert torch.equal(other(ids).logits, target(ids).logits)
        assert shape_of(other) == shape_of(target)
        assert other.config.num_key_value_heads == target.config.num_key_value_heads


@pytest.mark.parametrize("family", SHAPED)
def test_shapes_that_the_class_does_not_build_go_both_ways_in_a_checkpoint(family):
    small, dense, other = SHAPED[family](), PLAIN[family](), PLAIN[family]()
    for target in (small, dense, small):
        checkpoint = {}
        save_shape(Holder(net=target), checkpoint)
        load_shape(Holder(model=other), json.loads(json.dumps(checkpoint)))
        other.load_state_dict(target.state_dict())
        ids = tokens()
        assert torch.equal(other(ids).logits, target(ids).logits)
        assert shape_of(other) == shape_of(target)


def test_what_the_class_does_not_build():
    for family in SHAPED:
        nothing = shape_beyond_config(PLAIN[family]())
        assert nothing == Shape({}, {}, {})
    found = shape_beyond_config(SHAPED["llama"]())
    mlp = "model.layers.1.mlp"
    assert found.tensors == {
        f"{mlp}.gate_proj.weight": (20, 32),
        f"{mlp}.up_proj.weight": (20, 32),
        f"{mlp}.down_proj.weight": (32, 20),
    }
    ends = ("gate_proj.out_features", "up_proj.out_features", "down_proj.in_features", "intermediate_size")
    assert found.attributes == {f"{mlp}.{end}": 20 for end in ends}


def test_what_the_class_builds_where_a_field_was_changed_after_building():
    model = llama()
    model.config.pad_token_id = 2
    found = shape_beyond_config(model)
    assert found.tensors == {}
    assert found.attributes == {"model.padding_idx": 0, "model.embed_tokens.padding_idx": 0}


@pytest.mark.parametrize("kind", [tuple, list, torch.Size])
def test_the_size_that_a_norm_normalizes_follows_its_weight(kind):
    models = [PLAIN["gpt2"](n_embd=width, n_head=width // 8) for width in (32, 16)]
    models[0].transformer.ln_f.normalized_shape = kind((32,))
    set_shape(models[0], shape_of(models[1]))
    models[0].load_state_dict(models[1].state_dict())
    ids = tokens()
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert models[0].transformer.ln_f.normalized_shape == kind((16,))


def test_a_kernel_as_long_as_a_bias_stays():
    convolution = nn.Conv1d(4, 3, 3)
    set_shape(convolution, shape_of(nn.Conv1d(4, 5, 3)))
    assert convolution.kernel_size == (3,)
    assert convolution(torch.ones(1, 4, 6)).shape == (1, 5, 4)


def test_the_flag_of_multi_query_attention_is_part_of_a_shape():
    dense, small = build_kv("gpt_bigcode"), build_kv("gpt_bigcode", multi_query=True)
    held = Shape.from_dict(json.loads(json.dumps(shape_of(small).to_dict())))
    assert (held.config["multi_query"], held.attributes["transformer.h.0.attn.multi_query"]) == (True, True)
    set_shape(dense, held)
    dense.load_state_dict(small.state_dict())
    assert dense.config.multi_query is True
    ids = tokens()
    assert torch.equal(dense(ids).logits, small(ids).logits)


def test_another_model_is_refused_before_anything_changes():
    model, before = llama(), shape_of(llama())
    with pytest.raises(
        ValueError, match="it lacks nothing of LlamaForCausalLM, and has model.layers.2.*, which LlamaForCausalLM lacks"
    ):
        set_shape(model, shape_of(llama(num_hidden_layers=3, hidden_size=64)))
    assert shape_of(model) == before


def test_what_the_class_builds_takes_no_memory_and_no_random_numbers():
    model, state = llama(), torch.get_rng_state()
    shadow = build_on_meta(model, model.config)
    assert {p.device.type for p in shadow.parameters()} == {"meta"}
    assert shape_of(shadow) == shape_of(model)
    assert torch.equal(torch.get_rng_state(), state)


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_finding_the_model():
    model, teacher = llama(), llama()
    assert locate_transformer(model) == ("", model)
    assert locate_transformer(Holder(net=Holder(inner=model))) == ("net.inner", model)
    assert locate_transformer(Holder(teacher=teacher, model=model)) == ("model", model)
    assert find_transformer(Holder(model=Holder(x=nn.Linear(1, 1), backbone=model))) is model
    with pytest.raises(ValueError, match=r"Holder contains more than one Hugging Face model \(a, b\)"):
        find_transformer(Holder(a=model, b=teacher))
    with pytest.raises(ValueError, match="Holder contains no Hugging Face model"):
        find_transformer(Holder(a=nn.Linear(1, 1)))


def test_a_composite_model_counts_as_one():
    parts = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**parts)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert, transformers.BertConfig(**parts, is_decoder=True, add_cross_attention=True)
    )
    model = transformers.EncoderDecoderModel(config)
    assert locate_transformer(Holder(net=model)) == ("net", model)


def test_in_a_checkpoint():
    small, lit, checkpoint = llama(), Holder(model=llama()), {}
    convert_kv_heads(small, 2)
    save_shape(Holder(net=small), checkpoint)
    assert checkpoint["billhook"]["prefix"] == "net."
    load_shape(lit, checkpoint)
    assert shape_of(lit.model) == shape_of(small)
    load_shape(lit, {})
    assert shape_of(lit.model) == shape_of(small)
    load_shape(lit, {}, otherwise=shape_of(llama()))
    assert shape_of(lit.model) == shape_of(llama())
