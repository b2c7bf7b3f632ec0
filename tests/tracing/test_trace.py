"""What trace finds, and from what: layouts of known families, roles, sources of models, refusals."""

import json

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
import transformers
from small_configs import architectures, build, has_experts, small_config
from torch import nn

import billhook as bh
from billhook.model.meta import from_name
from billhook.tracing.roles import Part


def small(family: str, **changes: object) -> transformers.PreTrainedModel:
    _, _, config_class, model_class = next(architectures(family))
    config = small_config(config_class)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return build(config, model_class, "batched_mm" if has_experts(config) else "eager")


HIDDEN = "hidden:48"
TREES = [
    ("llama", "self_attn.q_proj.weight", f"[kv:2 * group:3 * (f:8 + f:8), {HIDDEN}]"),
    ("llama", "self_attn.k_proj.weight", f"[kv:2 * (f:8 + f:8), {HIDDEN}]"),
    ("llama", "self_attn.v_proj.weight", f"[kv:2 * v:16, {HIDDEN}]"),
    ("llama", "self_attn.o_proj.weight", f"[{HIDDEN}, kv:2 * group:3 * v:16]"),
    ("llama", "mlp.down_proj.weight", f"[{HIDDEN}, channel:80]"),
    ("llama", "rotary_emb.inv_freq", "[f:8]"),
    ("gpt2", "attn.c_attn.weight", f"[{HIDDEN}, (head:6 * qk:8) + (head:6 * qk:8) + (head:6 * v:8)]"),
    ("gpt2", "wpe.weight", f"[position:64, {HIDDEN}]"),
    ("gpt_bigcode", "attn.c_attn.weight", f"[(group:6 * qk:8) + qk:8 + v:8, {HIDDEN}]"),
    ("phi3", "self_attn.qkv_proj.weight", f"[(kv:2 * group:3 * (f:4 + f:4)) + (kv:2 * (f:4 + f:4)) + (kv:2 * v:8), {HIDDEN}]"),
    ("phi3", "mlp.gate_up_proj.weight", f"[channel:80 + channel:80, {HIDDEN}]"),
    ("bloom", "self_attention.query_key_value.weight", f"[(head:4 + head:2) * 3 * qk:8, {HIDDEN}]"),
    ("modernbert", "attn.Wqkv.weight", f"[3 * head:6 * (f:4 + f:4), {HIDDEN}]"),
    ("modernbert", "mlp.Wi.weight", f"[channel:80 + channel:80, {HIDDEN}]"),
    ("mixtral", "mlp.experts.gate_up_proj", f"[expert:4, channel:80 + channel:80, {HIDDEN}]"),
    ("mixtral", "mlp.experts.down_proj", f"[expert:4, {HIDDEN}, channel:80]"),
    ("mixtral", "mlp.gate.weight", f"[expert:4, {HIDDEN}]"),
    ("gpt_oss", "mlp.experts.gate_up_proj", f"[expert:4, {HIDDEN}, channel:80 * 2]"),
    ("t5", "relative_attention_bias.weight", "[position:32, head:6]"),
    ("deepseek_v3", "self_attn.q_b_proj.weight", "[head:6 * (qk:12 + (f:4 * 2)), rank:20]"),
    ("deepseek_v3", "self_attn.kv_b_proj.weight", "[head:6 * (qk:12 + v:10), rank:18]"),
    ("deepseek_v3", "self_attn.kv_a_proj_with_mqa.weight", f"[rank:18 + (f:4 * 2), {HIDDEN}]"),
    ("mamba", "mixer.in_proj.weight", f"[channel:96 + channel:96, {HIDDEN}]"),
    ("mamba", "mixer.x_proj.weight", "[rank:3 + state:4 + state:4, channel:96]"),
    ("mamba", "mixer.A_log", "[channel:96, state:4]"),
]


@pytest.mark.parametrize(("family", "ending", "tree"), TREES, ids=[f"{family}-{ending}" for family, ending, _ in TREES])
def test_layouts_of_known_families(family: str, ending: str, tree: str) -> None:
    structure = bh.trace(small(family))
    name = next(name for name in structure.axes if name.endswith(ending))
    assert structure.tree(name) == tree


def test_interleaved_and_grouped_queries_keys_values() -> None:
    neox = bh.trace(small("gpt_neox", hidden_size=48, rotary_pct=0.5))
    assert "head:6 * (" in neox.tree("gpt_neox.layers.0.attention.query_key_value.weight")
    falcon = small("falcon", new_decoder_architecture=True, num_kv_heads=2)
    tree = bh.trace(falcon).tree("transformer.h.0.self_attention.query_key_value.weight")
    assert tree == f"[kv:2 * (group:3 + 1 + 1) * (f:4 + f:4), {HIDDEN}]"


def rows(part: Part) -> list[int]:
    return part.positions.tolist()


def test_rows_of_fused_matrices_that_make_queries_keys_and_values() -> None:
    (first, *_) = bh.trace(small("gpt2")).attention
    assert [rows(part) for part in (first.q[0], first.k[0], first.v[0])] == [[*range(a, a + 48)] for a in (0, 48, 96)]
    (first, *_) = bh.trace(small("bloom")).attention  # [head, 3, head_dim]
    places = np.arange(144).reshape(6, 3, 8)
    assert [rows(part) for part in (first.q[0], first.k[0], first.v[0])] == [places[:, i].ravel().tolist() for i in range(3)]
    (first, *_) = bh.trace(small("gpt_neox")).attention
    assert [rows(part) for part in (first.q[0], first.k[0], first.v[0])] == [places[:, i].ravel().tolist() for i in range(3)]
    (first, *_) = bh.trace(small("falcon", new_decoder_architecture=True, num_kv_heads=2)).attention
    places = np.arange(80).reshape(2, 5, 8)  # [kv, 3 queries + key + value, head_dim]
    expected = [places[:, :3], places[:, 3], places[:, 4]]
    assert [rows(part) for part in (first.q[0], first.k[0], first.v[0])] == [p.ravel().tolist() for p in expected]
    assert first.o[0].name == "transformer.h.0.self_attention.dense.weight"


def test_gate_up_and_down_without_names() -> None:
    structure = bh.trace(small("llama"))
    names = [[parts[0].name.split(".")[-2] for parts in (one.gate, one.up, one.down)] for one in structure.feed_forward]
    assert names == [["gate_proj", "up_proj", "down_proj"]] * 2
    (one, *_) = bh.trace(small("phi3")).feed_forward
    assert (rows(one.gate[0]), rows(one.up[0])) == ([*range(80)], [*range(80, 160)])
    (one, *_) = bh.trace(small("gpt_oss")).feed_forward  # gate and up interleaved
    assert (rows(one.gate[0]), rows(one.up[0])) == ([*range(0, 160, 2)], [*range(1, 160, 2)])
    (one, *_) = bh.trace(small("bert")).feed_forward
    assert not one.gate
    assert one.up[0].name.endswith("intermediate.dense.weight")


def test_roles_of_every_attention_and_kinds_of_its_heads() -> None:
    for family, kinds in (
        ("llama", ("kv_head", "query_head")),
        ("gpt_bigcode", ("query_head",)),
        ("bert", ("head",)),
        ("t5", ("head",)),
    ):
        structure = bh.trace(small(family))
        heads = [group for group in structure.groups if group.kind in ("kv_head", "query_head", "head")]
        assert {group.kind for group in heads} == set(kinds)
        assert all(len(one.o) == 1 for one in structure.attention)
    assert len(bh.trace(small("t5")).attention) == 6  # two of the encoder, four of the decoder


def test_a_bias_that_layers_share_makes_their_heads_one_group() -> None:
    structure = bh.trace(small("t5"))
    encoder = next(g for g in structure.of_kind("head") if any("encoder" in m.name and "relative" in m.name for m in g.members))
    assert {m.name.split(".")[2] for m in encoder.members} == {"0", "1"}  # both layers of the encoder
    assert len([m for m in encoder.members if m.reads]) == 2


def test_alibi_is_flagged() -> None:
    for family in ("bloom", "mpt"):
        for group in bh.trace(small(family)).of_kind("head"):
            assert "const" in group.flags
            assert "constant" in group.reason


def test_tied_embeddings_are_one_member_with_two_names() -> None:
    structure = bh.trace(from_name("tiny"))
    assert structure.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    (vocab,) = structure.of_kind("vocab")
    assert [m.name for m in vocab.members] == ["model.embed_tokens.weight"]
    assert structure.tree("lm_head.weight") == structure.tree("model.embed_tokens.weight")
    untied = bh.trace(small("llama", tie_word_embeddings=False))
    assert {m.name for m in untied.of_kind("vocab")[0].members} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_norms_over_all_heads_are_members_and_flagged() -> None:
    structure = bh.trace(small("olmo2"))
    for group in structure.of_kind("kv_head", "query_head"):
        assert "normed" in group.flags
        assert any("norm" in member.name for member in group.members)


def test_the_same_from_config_folder_name_meta_and_real_model(tmp_path) -> None:
    model = bh.load("tiny")
    model.config.save_pretrained(tmp_path)
    expected = str(bh.trace(model))
    for source in (model.config, str(tmp_path), str(tmp_path / "config.json"), "tiny"):
        assert str(bh.trace(source)) == expected
    with torch.device("meta"):
        assert str(bh.trace(transformers.LlamaForCausalLM(model.config).to(torch.float16))) == expected


def test_nothing_of_the_model_is_touched() -> None:
    model = bh.load("tiny").train()
    calls: list[str] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("called"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, rng = model.config.to_json_string(use_diff=False), torch.get_rng_state()
    bh.trace(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert not calls
    assert model.training
    assert model.config.to_json_string(use_diff=False) == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(hasattr(tensor, "_billhook") for tensor in [*model.parameters(), *model.buffers()])


def test_lora_matrices_join_the_right_axes() -> None:
    model = peft.get_peft_model(bh.load("tiny"), peft.LoraConfig(r=4, target_modules="all-linear"))
    structure = bh.trace(model)
    layer = "model.layers.0.self_attn"
    assert structure.tree(f"{layer}.q_proj.lora_A.default.weight") == "[rank:4, hidden:256]"
    assert structure.tree(f"{layer}.q_proj.lora_B.default.weight") == "[head:8 * (f:16 + f:16), rank:4]"
    assert structure.tree(f"{layer}.o_proj.lora_A.default.weight") == "[rank:4, head:8 * v:32]"
    assert {part.name.split(".")[4] for part in structure.attention[0].q} == {"q_proj"}
    assert len(structure.attention[0].q) == 2


def test_a_model_inside_a_lightning_module() -> None:
    class Mine(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bh.load("tiny")
            self.head = nn.Linear(3, 3)

    assert str(bh.trace(Mine())) == str(bh.trace("tiny"))


def test_example_inputs_of_the_user() -> None:
    model = small("t5")
    ids = torch.ones(3, 9, dtype=torch.long)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "attention_mask": torch.ones(3, 9)}
    assert bh.trace(model, example_inputs=given).to_json()["groups"] == bh.trace(model).to_json()["groups"]
    mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    (channel,) = [g for g in bh.trace(mlp, example_inputs=torch.zeros(5, 4)).groups if not g.reason]
    assert (channel.kind, channel.size, len(channel.members)) == ("channel", 6, 3)


def test_what_a_forward_did_not_use_is_said_and_minded() -> None:
    structure = bh.trace(small("dinov2"))
    assert structure.untouched == ("dinov2.embeddings.mask_token",)
    (residual,) = structure.of_kind("residual")
    assert "mask_token, which the run never used" in residual.reason
    assert not any(group.reason for group in structure.of_kind("head"))


def test_counts_and_bytes_of_a_unit() -> None:
    structure = bh.trace(small("llama"))
    kv = structure.of_kind("kv_head")[0]
    assert kv.entries == 16 * 48 * 2 + 3 * 16 * 48 * 2  # key and value rows, rows of three queries, columns of the output
    assert kv.bytes == 4 * kv.entries
    square = bh.trace(nn.Sequential(lin := nn.Linear(6, 6), lin), example_inputs=torch.zeros(2, 6))
    assert square.groups[0].entries == 6 * 6 - 5 * 5 + 1


def test_json_and_table_hold_everything() -> None:
    structure = bh.trace(small("deepseek_v3"))
    plain = json.loads(json.dumps(structure.to_json()))
    assert [group["kind"] for group in plain["groups"]] == [group.kind for group in structure.groups]
    assert plain["attention"][0]["q"][0]["positions"] == [[0, 119]]
    assert plain["attention"][0]["k"][0]["positions"][0] == [0, 11]
    assert plain["parameters"]["lm_head.weight"] == {"shape": [101, 48], "axes": "[vocab:101, hidden:48]"}
    text = str(structure)
    for word in (
        "DeepseekV3ForCausalLM",
        "head",
        "expert",
        "rank",
        "hidden dimension",
        "not pruned",
        "tokens belong to the tokenizer, too: remove them with tokens=",
    ):
        assert word in text


def test_positions_of_units() -> None:
    structure = bh.trace(small("gpt2"))
    head = structure.of_kind("head")[0]
    member = next(m for m in head.members if m.name.endswith("c_attn.weight"))
    expected = [*range(8, 16), *range(56, 64), *range(104, 112)]
    assert head.positions(member, [1]).tolist() == expected
    assert head.where == "transformer.h.0.attn"


def test_seven_billion_parameters_from_a_config_without_memory() -> None:
    structure = bh.trace(transformers.LlamaConfig())
    assert len(structure.attention) == len(structure.feed_forward) == 32
    assert structure.tree("model.layers.31.self_attn.q_proj.weight") == "[head:32 * (f:64 + f:64), hidden:4096]"


def test_refusals_name_what_came_and_what_is_legal() -> None:
    with pytest.raises(ValueError, match="example_inputs=None: Linear is not a transformers model"):
        bh.trace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no config.json"):
        bh.trace("tests")
    with pytest.raises(ValueError, match="is not a config of a family that transformers knows"):
        bh.trace("examples/quickstart.yaml")
    with pytest.raises(ValueError, match=r"jetmoe|JetMoe.*modeling_jetmoe.py:\d+, op split_with_sizes"):
        bh.trace(small("jetmoe"))
    with pytest.raises(ValueError, match="name='nothing' is not a parameter that the run used"):
        bh.trace("tiny").tree("nothing")
