"""Which channels, hidden dimensions and experts are found, in every family; who reads them, checked by names."""

import warnings

import numpy as np
import peft
import pytest

import billhook as bh
from billhook.importance.baselines import RandomUnits
from billhook.model.inputs import outputs_match, run_outputs
from billhook.tracing.trace import trace
from billhook.units.find import find_units, of_kind, units_of
from kit.families import build, llama, tokens
from kit.removal import make
from kit.shaped import bert, gpt2
from kit.units import EVERY, EXPERTS, HELD, WITHOUT_CHANNELS, down_projections

ALL = ["head", "channel", "residual", "expert"]

RESIDUAL = {  # streams, where there is not one
    "albert": 2,  # the embeddings are projected
    "swin": 4, "convnext": 4, "resnet": 4,  # by stages
    "recurrent_gemma": 3,  # a recurrence in each of two blocks
    "wav2vec2": 2, "hubert": 2,  # groups of a convolution, and channels of each
    "WhisperForConditionalGeneration": 2,
}  # fmt: skip


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "mamba", "falcon")
@pytest.mark.parametrize("name", EVERY)
def test_in_every_family(name):
    model = make(name)
    found = find_units(model, ["channel", "residual", "expert"])
    channels = of_kind(found, "channel")
    assert [one.own_readers[0] for one in channels.values() if one.own_readers] == down_projections(model)
    assert all(len(one.own_readers) <= 1 for one in channels.values())
    parameter, dim = HELD.get(name, ("-", 0))
    held = [[(m.name, m.dim) for m in one.members if m.reads] for one in channels.values() if not one.own_readers]
    assert held == [[(own, dim)] for own, _ in model.named_parameters() if own.endswith(parameter)]
    assert bool(channels) == (name not in WITHOUT_CHANNELS)
    for one in channels.values():
        assert one.kv_of.tolist() == list(range(one.count()))
        if one.readers:
            assert one.index.tolist() == list(range(one.count()))
    assert len(of_kind(found, "expert")) == EXPERTS.get(name, 0)
    assert len(of_kind(found, "residual")) == RESIDUAL.get(name, 1)
    assert not any(one.readers for one in of_kind(found, "expert").values())


@pytest.mark.daily("segformer")
@pytest.mark.parametrize("name", ["apertus", "segformer", "pvt_v2"])
def test_without_some_it_computes_as_if_they_were_masked(name):
    """An activation that learns two numbers, or a convolution of each channel by itself, in a plain feed-forward."""
    model = make(name)
    found = find_units(model, "channel")
    assert {one.readers[0].rpartition(".")[2] for one in found.values()} <= {"down_proj", "fc2", "dense2"}
    gone = {place: [number, one.count() // 2] for number, (place, one) in enumerate(found.items())}
    with bh.mask(model, gone, "channel"):
        expected = run_outputs(model)
    bh.pruning.prune_units(model, gone, kind="channel")
    assert outputs_match(expected, run_outputs(model), 1e-9)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "those of backbone.layers.0.mixer go through a convolution and a gate, or are read twice"),
        ("bit", "those of bit are in no block; those of bit.encoder.stages.0.layers.0 are made or read by a conv"),
    ],
)
def test_why_there_are_none(name, why):
    model = make(name)
    with pytest.raises(ValueError, match=f"has no channels; {why}"):
        find_units(model, "channel")
    with pytest.raises(ValueError, match=f"channels=0.25: the model has no prunable units; {why}"):
        bh.plan(model, bh.importance.WeightNorm(), channels=0.25)


class TestByName:
    """What belongs to which units, against lists written down from the models' own code."""

    @staticmethod
    def members(one):
        return {(member.name, member.dim, member.reads) for member in one.members}

    def test_llama(self):
        found = find_units(llama(), ALL)
        assert list(found) == [
            "model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.1.mlp", "",
        ]  # fmt: skip
        assert [one.kind for one in found.values()] == ["head"] * 2 + ["channel"] * 2 + ["residual"]
        mlp = "model.layers.1.mlp"
        assert self.members(found[mlp]) == {
            (f"{mlp}.gate_proj.weight", 0, False), (f"{mlp}.up_proj.weight", 0, False), (f"{mlp}.down_proj.weight", 1, True),
        }  # fmt: skip
        layers = [f"model.layers.{n}" for n in (0, 1)]
        reads = {f"{own}.{n}.weight" for own in layers for n in
                 ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
        reads |= {"lm_head.weight"}
        writes = {f"{own}.{n}.weight" for own in layers for n in ("self_attn.o_proj", "mlp.down_proj")}
        scales = {f"{own}.{n}.weight" for own in layers for n in ("input_layernorm", "post_attention_layernorm")}
        expected = {(n, 1, True) for n in reads} | {(n, 0, False) for n in writes | scales | {"model.norm.weight"}}
        assert self.members(found[""]) == expected | {("model.embed_tokens.weight", 1, False)}
        assert set(found[""].readers) == {n.removesuffix(".weight") for n in reads}

    def test_gpt2_whose_matrices_lie_the_other_way(self):
        found = find_units(gpt2(), ALL)
        mlp = "transformer.h.0.mlp"
        assert self.members(found[mlp]) == {
            (f"{mlp}.c_fc.weight", 1, False), (f"{mlp}.c_fc.bias", 0, False), (f"{mlp}.c_proj.weight", 0, True),
        }  # fmt: skip
        assert found[mlp].readers == (f"{mlp}.c_proj",)
        stream = found["transformer"]
        assert {(n, d) for n, d, _ in self.members(stream) if "wte" in n or "wpe" in n} == {
            ("transformer.wte.weight", 1),
            ("transformer.wpe.weight", 1),
        }
        assert len(stream.members) == 2 + 2 * (4 + 2 * 2 + 2) + 2
        assert set(stream.readers) == {"lm_head"} | {
            f"transformer.h.{n}.{own}" for n in (0, 1) for own in ("attn.c_attn", "mlp.c_fc")
        }

    def test_mixtral(self):
        found = find_units(build("mixtral"), ALL)
        mlp = "model.layers.0.mlp"
        assert self.members(found[f"{mlp}.experts"]) == {
            (f"{mlp}.experts.gate_up_proj", 1, False), (f"{mlp}.experts.down_proj", 2, True),
        }  # fmt: skip
        gate_up = next(m for m in found[f"{mlp}.experts"].members if m.dim == 1)
        assert found[f"{mlp}.experts"].of_member(gate_up).tolist() == [*range(48), *range(48)]
        assert {(n, d) for n, d, _ in self.members(found[mlp])} == {
            (f"{mlp}.gate.weight", 0), (f"{mlp}.experts.gate_up_proj", 0), (f"{mlp}.experts.down_proj", 0),
        }  # fmt: skip
        assert (found[mlp].kind, found[mlp].count(), found[mlp].readers) == ("expert", 4, ())


class TestWhichOnes:
    def test_kinds_that_are_asked_for_in_their_order(self):
        model = build("mixtral")
        assert [one.kind for one in find_units(model, ["expert", "residual", "expert"]).values()] == ["expert"] * 2 + ["residual"]
        with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
            find_units(llama(), "expert")
        with pytest.raises(ValueError, match="LlamaForCausalLM has no units"):
            find_units(llama(), [])
        with pytest.raises(ValueError, match="kind='rank' must be one of head, channel, residual, expert, block"):
            find_units(model, ["head", "rank"])

    def test_a_structure_that_is_known(self):
        model = llama()
        structure = trace(model)
        found = units_of(model, structure, ALL)
        assert all(set(one.leaves) <= {group.leaf for group in structure.groups} for one in found.values())

    def test_two_of_one_name(self):
        found = find_units(make("albert"), ["residual"])
        assert list(found) == ["", " residuals"]
        assert list(find_units(make("resnet"), ["residual"]))[:3] == [
            "resnet.encoder.stages", "resnet.encoder.stages residuals", "resnet.encoder.stages residuals 2",
        ]  # fmt: skip

    def test_a_single_block_and_blocks_that_share_their_weights(self):
        assert list(find_units(llama(num_hidden_layers=1), ["channel"])) == ["model.layers.0.mlp"]
        assert len(find_units(make("albert"), ["channel"])) == 1

    def test_no_channels_outside_of_blocks(self):
        """Neither a pooler nor the transform of a masked language model's head."""
        assert set(find_units(bert(), ["channel"])) == {f"bert.encoder.layer.{n}" for n in (0, 1)}

    def test_layers_of_adapters_stand_for_what_they_adapt(self):
        config = peft.LoraConfig(target_modules=["up_proj", "down_proj"], r=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(llama(), config)
        one = next(iter(find_units(model, ["channel"]).values()))
        assert [name.rpartition(".")[2] for name in one.readers] == ["down_proj"]
        assert {name.split("mlp.")[1] for name in (m.name for m in one.members)} == {
            "gate_proj.weight", "up_proj.base_layer.weight", "up_proj.lora_B.default.weight",
            "down_proj.base_layer.weight", "down_proj.lora_A.default.weight",
        }  # fmt: skip

    def test_positions_of_what_is_read(self):
        model = llama()
        for one in find_units(model, ["channel", "residual"]).values():
            for member in one.members:
                index = one.of_member(member)
                assert sorted(set(index.tolist())) == list(range(one.count()))
                assert len(index) == model.get_parameter(member.name).shape[member.dim]
        fused = find_units(make("phi3"), ["channel"])["model.layers.0.mlp"]
        gate_up = next(m for m in fused.members if not m.reads)
        assert np.array_equal(fused.of_member(gate_up), np.tile(np.arange(80), 2))

    def test_what_is_left_is_found_again(self):
        model = llama()
        bh.apply(model, bh.plan(model, RandomUnits(), channels=0.5, residual=0.25))
        found = find_units(model, ["channel", "residual"])
        assert [one.count() for one in found.values()] == [24, 24, 24]
        model(tokens())


def test_a_module_that_stands_in_several_places_reads_once():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    (one,) = find_units(model, ["channel"]).values()
    assert one.readers == ("model.layers.0.mlp.down_proj",)
