"""Which positions are which head: found by trace, and here by hand."""

import pytest
import torch
import transformers
from small_configs import architectures, build, small_config
from torch import nn

import billhook as bh
from billhook.units.find import find_units, unit_ids
from kit.families import SMALL
from kit.units import ATTENTIVE, SEQ2SEQ, WITHOUT_HEADS, hooks, small, weight_of


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "falcon", "deepseek_v3", "codegen")
@pytest.mark.parametrize("name", [*ATTENTIVE, *SEQ2SEQ])
def test_heads_stand_side_by_side_and_kv_heads_serve_neighbours(name):
    model, heads = small(name).model, small(name).heads
    config = model.config
    for one in heads.values():
        count, groups = len(one.kv_of), one.count("kv_head")
        assert one.count() == count
        if name != "swin" and "mamba" not in one.name and name != "mamba2":
            assert count == config.num_attention_heads
            expected = getattr(config, "num_key_value_heads", None) or count
            assert groups == {"falcon": 1, "gpt_bigcode": 1, "dbrx": 2, "deepseek_v3": count}.get(name, expected)
        for reader in one.readers:
            width = len(weight_of(model, reader)) // count
            assert one.index.tolist() == [position // width for position in range(width * count)]
        assert one.kv_of.tolist() == [head // (count // groups) for head in range(count)]
        assert one.positions("kv_head").tolist() == [int(one.kv_of[head]) for head in one.index]


def test_names_and_order_are_those_of_the_run():
    assert list(small("llama").heads) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    bart = list(small("BartForConditionalGeneration").heads)
    decoder = [f"model.decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "encoder_attn")]
    assert bart == ["model.encoder.layers.0.self_attn", "model.encoder.layers.1.self_attn", *decoder]
    t5 = [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    t5 += [f"decoder.block.{i}.layer.{j}.{kind}Attention" for i in (0, 1) for j, kind in enumerate(("Self", "EncDec"))]
    assert list(small("t5").heads) == t5
    assert len(small("albert").heads) == 1


def test_members_are_the_rows_of_queries_and_the_columns_that_are_read():
    heads = small("llama").heads["model.layers.0.self_attn"]  # 6 query heads of 16, 2 KV heads
    blocks = [position // 16 for position in range(96)]
    assert {m.name.split(".")[-2]: m.dim for m in heads.members_by_unit()} == {"q_proj": 0, "o_proj": 1}
    assert all(heads.of_member(member).tolist() == blocks for member in heads.members_by_unit())
    heads = small("gpt2").heads["transformer.h.0.attn"]  # 6 heads of 8, queries, keys and values in one matrix
    blocks = [position // 8 for position in range(48)]
    found = {m.name.removeprefix("transformer.h.0.attn."): (m.dim, heads.of_member(m).tolist()) for m in heads.members_by_unit()}
    assert found == {"c_attn.weight": (1, blocks * 3), "c_attn.bias": (0, blocks * 3), "c_proj.weight": (0, blocks)}
    heads = small("phi3").heads["model.layers.0.self_attn"]  # keys and values are those of KV heads
    fused = next(member for member in heads.members_by_unit() if "qkv" in member.name)
    assert heads.of_member(fused).tolist() == blocks + [-1] * 32


@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_models_without_attention_are_refused(name):
    _, _, config, cls = next(architectures(name))
    with pytest.raises(ValueError, match=f"{cls.__name__} has no heads"):
        find_units(build(small_config(config), cls), "head")


def test_readers_are_those_of_all_query_heads_of_the_layer():
    heads = small("gemma3n_text").heads  # the last two layers have the keys and values of the first two
    assert [one.readers for one in heads.values()] == [(f"model.layers.{i}.self_attn.o_proj",) for i in range(4)]
    assert {(one.count(), one.count("kv_head")) for one in heads.values()} == {(6, 2)}
    heads = small("doge").heads  # a projection makes the mask from the values of KV heads
    assert [one.readers for one in heads.values()] == [(f"model.layers.{i}.self_attn.o_proj",) for i in range(2)]
    assert {(one.count(), one.count("kv_head")) for one in heads.values()} == {(6, 2)}


def test_what_no_head_gives_has_no_gate():
    case = small("convbert")  # 3 heads, and beside them a convolution as wide
    name, heads = next(iter(case.heads.items()))
    assert heads.index.tolist() == [position // 8 for position in range(24)] + [-1] * 24
    assert heads.positions("kv_head").tolist() == heads.index.tolist()
    weight = weight_of(case.model, heads.readers[0])
    with torch.no_grad():
        with bh.mask(case.model, {name: [0, 1, 2]}):
            masked = case.run()
        saved = weight[:24].clone()
        weight[:24] = 0
        torch.testing.assert_close(masked, case.run())
        weight[:24] = saved


def test_heads_that_cannot_be_told_apart_are_refused():
    config = small_config(transformers.MptConfig, n_heads=6)  # the slopes of ALiBi are interleaved, but for powers of two
    with pytest.raises(ValueError, match=r"heads of transformer\.blocks\.0\.attn cannot be distinguished"):
        find_units(build(config, transformers.MptForCausalLM), "head")


def test_attention_of_torch_itself_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    with pytest.raises(ValueError, match=r"attention\.out_proj\.weight is read by torch\.nn\.MultiheadAttention at once"):
        bh.mask(Own(), {0: [0]}, example_inputs={"x": torch.randn(2, 5, 32)})


def test_modules_of_ones_own_have_heads_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            q, k, v = (one(x).unflatten(-1, (4, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, x = Own(), torch.randn(2, 5, 32)
    with bh.mask(model, {0: [1, 2]}, example_inputs={"x": x}):
        masked = model(x)
    with torch.no_grad():
        model.o.weight[:, 8:24] = 0
    torch.testing.assert_close(masked, model(x))


def test_what_is_not_there_is_refused_and_what_is_legal_is_said():
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | sizes))
    heads = find_units(model, "head")
    layers = r"there are 0 to 1, in this order: model\.layers\.0\.self_attn, model\.layers\.1\.self_attn$"
    for layer in (2, -1, True, "model.layers.0", None, 1.0):
        with pytest.raises(ValueError, match=rf"no module {layer!r}; {layers}"):
            bh.mask(model, {layer: [0]})
    for head in (6, -1, True, "0", 0.0):
        with pytest.raises(ValueError, match=rf"layers.1.self_attn has no head {head!r}; it has 0 to 5"):
            bh.mask(model, {0: [0], 1: [1, head]})
    with pytest.raises(ValueError, match="has no KV head 2; it has 0 to 1"):
        bh.mask(model, {0: [2]}, per="kv_head")
    for refused in (
        lambda: bh.mask(model, {0: [0]}, per="x"),
        lambda: bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), normalize=True, per="x"),
    ):
        with pytest.raises(ValueError, match=r"per='x' must be one of head, kv_head"):
            refused()
    with (
        pytest.raises(ValueError, match=r"per='x' must be one of head, kv_head"),
        bh.gates(model, bh.find_units(model, "head"), per="x"),
    ):
        pass
    assert not any("Gate" in repr(found) for found in hooks(model).values())
    assert unit_ids(heads, {0: [3, 1, 3], "model.layers.0.self_attn": [2]}) == {"model.layers.0.self_attn": [1, 2, 3]}
    assert unit_ids(heads, {0: (head for head in (1, 2))}) == {"model.layers.0.self_attn": [1, 2]}  # read once
    with pytest.raises(ValueError, match=r"decoder\.block\.0\.layer\.1\.EncDecAttention, \.\.\.$"):
        bh.mask(small("t5").model, {6: [0]})
