"""A generation loop on each kind of cache: transformers' own `generate` is the reference."""

import pytest
import torch
import transformers

from billhook.report.generation import Generation, generates
from kit.families import build, llama, tokens
from kit.shaped import gpt2

KINDS = ["static", "reserved", "dynamic"]
FAMILIES = ["llama", "mistral", "gemma2", "qwen3_moe"]  # of these, mistral and gemma2 attend over windows of 8


def said(model, ids, new):
    """What `generate` says, greedily and whatever ends a sentence."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_it_says_what_generate_says_also_after_rewinding_and_starting_anew(family, kind):
    model, ids = build(family), tokens(3, 12)
    expected = said(model, ids, 6)
    one = Generation(model, ids, 5, kind)
    for before in (one.start, one.rewind, one.rewind, one.start):
        before()
        if before == one.start:
            one.prefill()
        assert torch.equal(one.decode(), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_absolute_positions_go_on_in_the_cache(kind):
    model, ids = gpt2(initializer_range=0.5), tokens(2, 7)
    one = Generation(model, ids, 4, kind)
    one.prefill()
    assert torch.equal(one.decode(), said(model, ids, 5))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_is_allocated_and_when(kind):
    one = Generation(llama(num_key_value_heads=2), tokens(3, 12), 5, kind)
    one.prefill()
    room = 12 if kind == "dynamic" else 17
    assert one.cached_tokens == room
    assert [tuple(tensor.shape) for tensor in one.tensors] == [(3, 2, room, 4)] * 4  # keys and values of two layers
    places = [tensor.data_ptr() for tensor in one.tensors]
    one.decode()
    assert one.cached_tokens == 17
    assert ([tensor.data_ptr() for tensor in one.tensors] == places) == (kind != "dynamic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.inference_mode()
def test_one_prompt_fills_the_cache_for_all(family, kind):
    model, ids = build(family), tokens(1, 12).expand(3, -1)
    one = Generation(model, ids, 5, kind)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(len(inputs[0])))
    one.fill()
    assert read == [1 if family == "llama" else 3]  # windows are not all of a prompt
    assert torch.equal(one.decode(), said(model, ids, 6))
    one.rewind()
    assert torch.equal(one.decode(), said(model, ids, 6))


@torch.inference_mode()
def test_states_that_do_not_grow_are_held_too():
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4, conv_kernel=3, time_step_rank=4
    )
    one = Generation(transformers.MambaForCausalLM(config).eval(), tokens(2, 12), 3)
    one.prefill()
    assert sorted(tuple(tensor.shape) for tensor in one.tensors) == [(2, 64, 3), (2, 64, 4)]
    assert torch.equal(one.decode(), said(one.model, one.ids, 4))


@torch.inference_mode()
def test_an_encoder_reads_and_says_nothing():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model, shapes = transformers.BertModel(config).eval(), []
    model.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output[0].shape)))
    one = Generation(model, tokens(2, 12), 3)
    one.start()
    one.prefill()
    assert shapes == [(2, 12, 32)]
    assert one.tensors == []
    assert not generates(model)
