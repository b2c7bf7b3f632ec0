"""Heads are the right rows, sliced by hand; what is read and written again is the same, bit for bit."""

import copy

import peft
import pytest
import torch

from billhook.engine.lazy import by_parameter
from billhook.engine.store import store_of
from billhook.kv_heads.layout import HeadTensors, find_projections, read, written
from billhook.tracing.trace import trace
from kit import families, kv_zoo
from kit.families import llama, tokens

ZOO = (
    "phi3",
    "falcon",
    "old falcon",
    "gpt_bigcode",
    "t5",
    "bart",
    "whisper",
    "bert",
    "distilbert",
    "albert",
    "vit",
    "modernbert",
    "opt",
)
BUILD = {name: lambda name=name: kv_zoo.build(name) for name in (*ZOO, "gpt_neox", "bloom", "gpt2", "mpt", "codegen", "gptj")}
BUILD |= {name: lambda name=name: families.build(name) for name in ("qwen2", "qwen3", "gemma3_text", "olmo2", "mixtral")}
BUILD |= {"bf16": lambda: llama(attention_bias=True).bfloat16(), "half": lambda: kv_zoo.build("gpt2").half()}


def found_in(model):
    return find_projections(model, trace(model))


@pytest.mark.parametrize("family", BUILD)
def test_what_is_read_and_written_is_what_there_was(family):
    model = BUILD[family]()
    before, places = copy.deepcopy(model.state_dict()), found_in(model)
    for place in places.values():
        stacks = read(model, place)
        assert {one.dtype for one in (stacks.q, stacks.k, stacks.v, stacks.o)} == {torch.float64}
        assert len(stacks.q) == len(stacks.o) == place.queries * place.kv_heads
        assert len(stacks.k) == len(stacks.v) == place.kv_heads
        new = written(model, place, stacks)
        assert new.keys() == {place.q.linear, place.k.linear, place.v.linear, place.o.linear}
        for linear, own in new.items():
            parameters = dict(model.get_submodule(linear).named_parameters())
            assert own.keys() == parameters.keys()
            for name, value in own.items():
                assert value.dtype == parameters[name].dtype
                assert value.data_ptr() != parameters[name].data_ptr()
                assert torch.equal(value, parameters[name])
        other = written(model, place, HeadTensors(-stacks.q, 2 * stacks.k, 3 * stacks.v, 4 * stacks.o))  # each only where it lies
        again = HeadTensors(stacks.q.clone(), stacks.k.clone(), stacks.v.clone(), stacks.o.clone())
        with store_of(model).computing_with(by_parameter(other)):
            told = read(model, place)
        for one, factor, own in ((told.q, -1, again.q), (told.k, 2, again.k), (told.v, 3, again.v), (told.o, 4, again.o)):
            torch.testing.assert_close(one, factor * own, rtol=1e-2 if model.dtype != torch.float32 else 1e-6, atol=1e-6)
    assert len(places) == {"t5": 6, "bart": 6, "whisper": 6, "albert": 1}.get(family, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def with_bias(linear, rows):
    """Rows of a linear, with their bias as a last column."""
    weight = linear.weight.t() if linear.weight.shape[0] != len(linear.bias) else linear.weight
    return torch.cat([weight[rows], linear.bias[rows, None]], 1).double()


def by_hand(family, model):
    """The first attention's rows, with nothing but slices: 8 query heads of width 4 (Llama and Phi-3: 4 KV heads)."""
    if family == "llama":
        own = model.model.layers[0].self_attn
        q, k, v = own.q_proj.weight.double(), own.k_proj.weight.double(), own.v_proj.weight.double()
        return q.split(4), k.split(4), v.split(4), own.o_proj.weight.double().split(4, 1)
    if family == "phi3":
        own = model.model.layers[0].self_attn
        q, k, v = own.qkv_proj.weight.double().split([32, 16, 16])
        return q.split(4), k.split(4), v.split(4), own.o_proj.weight.double().split(4, 1)
    if family == "gpt2":
        own = model.transformer.h[0].attn
        rows = [[with_bias(own.c_attn, slice(start + 4 * h, start + 4 * h + 4)) for h in range(8)] for start in (0, 32, 64)]
        return *rows, own.c_proj.weight.t().double().split(4, 1)
    if family == "falcon":  # two query heads, a key and a value of each KV head in turn
        own = model.transformer.h[0].self_attention
        rows = [with_bias(own.query_key_value, slice(4 * n, 4 * n + 4)) for n in range(16)]
        q = [rows[n] for n in range(16) if n % 4 < 2]
        return q, rows[2::4], rows[3::4], own.dense.weight.double().split(4, 1)
    own = model.gpt_neox.layers[0].attention  # query, key and value of each head in turn
    rows = [with_bias(own.query_key_value, slice(4 * n, 4 * n + 4)) for n in range(24)]
    return rows[0::3], rows[1::3], rows[2::3], own.dense.weight.double().split(4, 1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon", "gpt_neox"])
def test_heads_are_the_rows_that_they_are(family):
    model = llama() if family == "llama" else kv_zoo.build(family)
    (place, _) = found_in(model).values()
    stacks = read(model, place)
    for one, rows in zip((stacks.q, stacks.k, stacks.v, stacks.o), by_hand(family, model), strict=True):
        assert torch.equal(one, torch.stack(list(rows)))


def test_keys_and_values_of_a_cross_attention_read_the_encoder():
    places = found_in(kv_zoo.build("t5"))
    name = "decoder.block.1.layer.1.EncDecAttention"
    place = places[name]
    assert (place.name, place.q.linear, place.k.linear) == (name, f"{name}.q", f"{name}.k")
    assert (place.v.linear, place.o.linear) == (f"{name}.v", f"{name}.o")


def test_other_parameters_stand_in_under_autocast_too_and_go():
    model, ids = llama(), tokens()
    place = found_in(model)["model.layers.0.self_attn"]
    stacks = read(model, place)
    new = written(model, place, HeadTensors(stacks.q, stacks.k, 2 * stacks.v, stacks.o))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(ids).logits  # which keeps the weights in bfloat16
        with store_of(model).computing_with(by_parameter(new)):
            other = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
    assert (other - plain).abs().max() > 1e-3 * plain.abs().max()


def test_refusals_say_what_is_the_matter():
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["k_proj"])).base_model.model
    with pytest.raises(
        ValueError, match=r"its keys are made by .*k_proj.* and .*, not by one linear \(with LoRA attached, merge"
    ):
        found_in(adapted)
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.v_proj = layer.self_attn.k_proj
    with pytest.raises(ValueError, match="its keys and values are the same outputs of .*layers.0.self_attn.k_proj"):
        found_in(model)
