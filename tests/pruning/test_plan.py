"""What goes with channels, hidden dimensions and experts: cuts, numbers, tables, JSON, and every plan that is refused."""

import json

import pytest
import torch
import transformers
from small_configs import build as small
from small_configs import small_config
from torch import nn

import billhook as bh
from billhook.importance.baselines import RandomUnits
from billhook.model.shape import shape_of
from billhook.units.find import find_units
from kit.families import ATTENTIONS, MLPS, build, llama
from kit.removal import make
from kit.shaped import bert


def refused(model, units, match, kinds=("head", "channel", "residual", "expert")):
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}, shape_of(model)
    with pytest.raises(ValueError, match=match):
        bh.pruning.plan_units(model, units, kinds)
    assert ({name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}, shape_of(model)) == before


class TestWhatGoes:
    def test_channels(self):
        model = llama()
        plan = bh.pruning.plan_units(model, {MLPS[0]: [0, 3, 47], MLPS[1]: []}, "channel")
        stays = [n for n in range(48) if n not in (0, 3, 47)]
        assert {place: kept.tolist() for place, kept in plan.cuts.items()} == {
            (f"{MLPS[0]}.gate_proj.weight", 0): stays,
            (f"{MLPS[0]}.up_proj.weight", 0): stays,
            (f"{MLPS[0]}.down_proj.weight", 1): stays,
        }
        assert plan.units == {MLPS[0]: [0, 3, 47]}
        assert (plan.before[MLPS[0]], plan.after[MLPS[0]], plan.after[MLPS[1]]) == ((48,), (45,), (48,))
        assert plan.parameters == (model.num_parameters(), model.num_parameters() - 3 * 3 * 32)

    def test_residual_channels_of_tied_embeddings_go_once(self):
        model = llama(tie_word_embeddings=True)
        plan = bh.pruning.plan_units(model, {"model": [1, 30]}, "residual")
        assert len(plan.cuts) == 1 + 2 * 9 + 1
        assert all(len(kept) == 30 for kept in plan.cuts.values())
        rows = 64 + 2 * (32 + 16 + 16 + 32 + 48 * 3 + 2) + 1  # embeddings; q, k, v, o, mlp and norms; the last norm
        assert plan.parameters[0] - plan.parameters[1] == 2 * rows

    def test_experts_and_their_router(self):
        plan = bh.pruning.plan_units(build("mixtral"), {MLPS[1]: [3, 0, 3]}, ["expert"])
        assert plan.units == {MLPS[1]: [0, 3]}
        assert {place: kept.tolist() for place, kept in plan.cuts.items()} == {
            (f"{MLPS[1]}.gate.weight", 0): [1, 2],
            (f"{MLPS[1]}.experts.gate_up_proj", 0): [1, 2],
            (f"{MLPS[1]}.experts.down_proj", 0): [1, 2],
        }

    def test_kinds_in_one_matrix(self):
        plan = bh.pruning.plan_units(llama(), {MLPS[0]: [0], "": [5], ATTENTIONS[0]: [0, 1]}, ["head", "channel", "residual"])
        assert len(plan.cuts[f"{MLPS[0]}.up_proj.weight", 0]) == 47
        assert len(plan.cuts[f"{MLPS[0]}.up_proj.weight", 1]) == 31
        assert len(plan.cuts[f"{ATTENTIONS[0]}.o_proj.weight", 0]) == 31
        assert len(plan.cuts[f"{ATTENTIONS[0]}.o_proj.weight", 1]) == 24

    def test_nothing_changes_by_a_plan_and_an_empty_plan_is_none(self):
        model = llama()
        before = {name: id(p) for name, p in model.named_parameters()}, shape_of(model)
        bh.pruning.plan_units(model, {MLPS[0]: [0, 1]}, "channel")
        plan = bh.pruning.plan_units(model, {MLPS[0]: ()}, "channel")
        bh.apply(model, plan)
        assert (plan.units, plan.cuts, plan.words) == ({}, {}, "")
        assert plan.before == plan.after
        assert ({name: id(p) for name, p in model.named_parameters()}, shape_of(model)) == before


class TestTable:
    def test_of_units_alone(self):
        plan = bh.pruning.plan_units(llama(), {MLPS[0]: range(12), MLPS[1]: range(12), "": [0]}, ["channel", "residual"])
        before, after = plan.parameters
        assert str(plan).splitlines() == [
            f"LlamaForCausalLM: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)",
            "  model.layers.*.mlp  48 -> 36 channels in each of 2",
            "  the model           32 -> 31 hidden dimensions",
        ]
        assert plan.words == "24 channels in 2 modules, 1 hidden dimension"

    def test_of_layers_that_differ_and_with_costs(self):
        plan = bh.plan(
            llama(num_hidden_layers=4),
            RandomUnits(),
            amount=bh.Amount(kv_heads=0.25, channels=0.5, first=1, last=1),
        )
        lines = str(plan).splitlines()
        now, then = plan.costs
        assert lines[1:4] == [
            f"  {now.flops:,} -> {then.flops:,} FLOPs per token ({1 - then.flops / now.flops:.1%} fewer)",
            f"  {now.kv_cache_bytes:,} -> {then.kv_cache_bytes:,} KV-cache bytes per token in float32 (12.5% fewer)",
            f"  {4 * plan.parameters[0]:,} -> {4 * plan.parameters[1]:,} bytes "
            f"({1 - plan.parameters[1] / plan.parameters[0]:.1%} fewer)",
        ]
        assert lines[4] == "  model.layers.*.self_attn  8 query, 4 KV heads in each of 2: 0, 3"
        assert lines[5].startswith("  model.layers.1.self_attn  8 -> 6 query, 3 KV heads; without ")
        assert lines[-3:] == [
            "  model.layers.*.mlp        48 channels in each of 2: 0, 3",
            "  model.layers.*.mlp        48 -> 24 channels in each of 2: 1, 2",
            "  3 KV heads cannot be divided among 2, 4, and 8 devices; 1, 2, 4, or a multiple of 8 can",
        ]

    def test_of_blocks_whose_places_are_the_blocks(self):
        plan = bh.pruning.plan_units(bert(), {f"bert.encoder.layer.{n}": [0] for n in (0, 1)}, ["channel"])
        assert str(plan).splitlines()[1:] == ["  bert.encoder.layer.*  48 -> 47 channels in each of 2"]


class TestJson:
    def test_out_and_in(self):
        model = build("mixtral")
        plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25, experts=0.5, residual=0.25, kv_heads=0.5)
        again = bh.ModelPlan.from_json(json.loads(json.dumps(plan.to_json())), model)
        assert again.units == plan.units
        assert (again.before, again.after, again.parameters, again.kinds) == (
            plan.before,
            plan.after,
            plan.parameters,
            plan.kinds,
        )
        assert again.cuts.keys() == plan.cuts.keys()
        assert all((again.cuts[place] == kept).all() for place, kept in plan.cuts.items())
        bh.apply(model, again)
        assert model.num_parameters() == plan.parameters[1]

    def test_of_something_else(self):
        model = llama()
        plain = bh.pruning.plan_units(model, {MLPS[0]: [0]}, ["channel"]).to_json()
        for broken in ({}, [], None, plain | {"kind": "heads"}):
            with pytest.raises(ValueError, match=r"plan: its kind is (None|'heads'), and must be one of blocks, "):
                bh.ModelPlan.from_json(broken, model)
        for missing in ("model", "kinds", "units", "before"):
            broken = {key: value for key, value in plain.items() if key != missing}
            with pytest.raises(ValueError, match="plan must be a mapping with model, kinds, units, before"):
                bh.ModelPlan.from_json(broken, model)
        with pytest.raises(ValueError, match=f"channels: {MLPS[0]} has no channel 48; it has 0 to 47"):
            bh.ModelPlan.from_json(plain | {"units": {MLPS[0]: [48]}}, model)
        with pytest.raises(ValueError, match=f"made for a LlamaForCausalLM .*{MLPS[0]}: 48 then, 20 now"):
            bh.ModelPlan.from_json(plain, llama(intermediate_size=20))
        with pytest.raises(ValueError, match=r"than this Qwen2ForCausalLM has \(another class\)"):
            bh.ModelPlan.from_json(plain, build("qwen2"))


class TestStale:
    def test_of_another_model_or_one_that_has_changed(self):
        model = llama()
        plan = bh.pruning.plan_units(model, {MLPS[0]: [0, 1], MLPS[1]: [4, 5]}, ["channel"])
        others = [llama(intermediate_size=40), llama(num_hidden_layers=3), build("qwen2"), build("mixtral")]
        for other in others:
            before = [id(p) for p in other.parameters()], shape_of(other)
            with pytest.raises(ValueError, match="plan: it was made for a LlamaForCausalLM with other units than this"):
                bh.apply(other, plan)
            assert ([id(p) for p in other.parameters()], shape_of(other)) == before
        bh.apply(model, plan)
        with pytest.raises(ValueError, match=f"{MLPS[0]}: 48 then, 46 now"):
            bh.apply(model, plan)  # twice
        tied = bh.pruning.plan_units(llama(tie_word_embeddings=True), {"model": [0]}, ["residual"])
        with pytest.raises(ValueError, match="plan: it was made for a LlamaForCausalLM with other units"):
            bh.apply(llama(), tied)

    def test_what_has_changed_elsewhere_does_not_matter(self):
        model = llama()
        first, second = bh.pruning.plan_units(model, {MLPS[0]: [0]}, ["channel"]), bh.pruning.plan_units(model, {0: [0, 1]})
        bh.apply(model, first)
        bh.apply(model, second)
        assert model.num_parameters() == llama().num_parameters() - 3 * 32 - 2 * 32 * 8 - 2 * 32 * 4


class BiasedByItself(nn.Module):
    """A feed-forward whose channels go through an op without a rule."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h + torch.histc(h, 48))


class TestRefused:
    def test_modules_and_units_that_are_not_there(self):
        model = llama()
        refused(
            model, {"model.layers.2.mlp": [0]}, r"units: there is no module 'model.layers.2.mlp'; there are 0 to 4, .*, \.\.\."
        )
        refused(model, {MLPS[0]: [0]}, f"module '{MLPS[0]}'; there are 0 to 1, in this order: {', '.join(ATTENTIONS)}$", ["head"])
        for unit in (48, -1, True, 1.0, "0"):
            refused(model, {MLPS[0]: [0, unit]}, f"units: {MLPS[0]} has no channel {unit!r}; it has 0 to 47")
        refused(model, {MLPS[0]: [0]}, "kind='rank' must be one of", ["rank"])

    def test_a_place_without_units(self):
        refused(llama(), {MLPS[1]: range(48)}, f"channels: {MLPS[1]} would be left without channels; at least one of its 48")
        refused(
            llama(),
            {"": range(32)},
            "hidden dimensions: the model would be left without hidden dimensions; at least one of its 32",
        )
        refused(build("mixtral"), {MLPS[0]: range(4)}, f"experts: {MLPS[0]} would be left without experts", ["expert"])

    def test_what_is_opaque_says_why(self):
        model = llama()
        model.model.layers[1].mlp = BiasedByItself()
        refused(model, {MLPS[1]: [0]}, f"channels: cannot be removed from {MLPS[1]}: no rule for the op histc", ["channel"])
        bh.apply(model, bh.pruning.plan_units(model, {MLPS[0]: [0]}, ["channel"]))
        with pytest.raises(ValueError, match="no rule for the op histc"):
            bh.plan(model, RandomUnits(), channels=0.5)

    def test_parameters_that_the_run_does_not_use(self):
        match = "hidden dimensions: cannot be removed from model.decoder: .* which the run never used, may have it too"
        refused(make("bart"), {"model.decoder": [0]}, match, ["residual"])

    def test_a_norm_over_the_channels(self):
        config = small_config(transformers.Mamba2Config)
        model = small(config, transformers.Mamba2ForCausalLM)
        with pytest.raises(ValueError, match="Mamba2ForCausalLM has no channels"):
            find_units(model, "channel")
        with pytest.raises(ValueError, match=r"channels=0.5: the model has no prunable units"):
            bh.plan(model, RandomUnits(), channels=0.5)

    def test_a_quantised_model(self):
        model = llama()
        weight = model.model.layers[1].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
        refused(
            model,
            {MLPS[0]: [0]},
            r"up_proj.weight is quantized \(torch.int8\). From FP8 and MXFP4 files, bh.stream removes",
            ["channel"],
        )
        refused(model, {ATTENTIONS[0]: [0, 1]}, r"up_proj.weight is quantized \(torch.int8\)", ["head"])
