"""Channels of experts: each expert loses its own, in all tensors, optimizer states, plans, and checkpoints."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import billhook as bh
from billhook.model.experts import expert_layers
from billhook.shrinking.shrink_plan import ShrinkPlan, simulated
from billhook.units import zero_units
from kit.families import build, tokens
from kit.sparsity import family

BATCHES = [{"input_ids": tokens(4, 16)} for _ in range(3)]
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "nemotron_h"]
pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation")


@torch.no_grad()
def without(model, plan):
    """A copy with zeros for the channels that each expert loses."""
    model = copy.deepcopy(model)
    for name, lost in plan.by_expert.items():
        experts = model.get_submodule(name)
        for number, channels in enumerate(lost):
            matrix = experts.down_proj[number]
            (matrix.mT if experts.is_transposed else matrix)[:, channels] = 0
    others = {name: numbers for name, numbers in plan.units.items() if name not in plan.by_expert}
    if others:
        zero_units(model, others, "channel")
    return model


@pytest.mark.daily("mixtral", "gpt_oss", "glm4_moe")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_smaller_model_computes_what_zeros_compute(name, tmp_path):
    model, ids = family(name), tokens()
    plan = bh.plan(model, bh.OutputNorm(), BATCHES, channels=0.25)
    assert plan.by_expert
    assert all((np.diff(lost) > 0).all() for lost in plan.by_expert.values())
    assert any((lost != lost[0]).any() for lost in plan.by_expert.values())
    read = bh.ModelPlan.from_json(plan.to_json(), model)
    read.check_made_for(model)
    assert read.to_json() == plan.to_json()
    with torch.no_grad():
        expected = without(model, plan)(input_ids=ids).logits
        bh.apply(model, read)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        bh.save(model, tmp_path / "small")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("importance", [bh.OutputNorm(), bh.OBS()])
def test_each_expert_loses_the_channels_of_its_lowest_scores(importance):
    """Scores of one expert are those of its matrix as the only reader of the channels."""
    model = build("qwen3_moe", num_experts=3)
    plan = bh.plan(model, importance, BATCHES, channels=0.25)
    ((name, units),) = list(bh.find_units(model, "channel").items())[:1]
    for number, lost in enumerate(plan.by_expert[name]):
        alone = copy.copy(units)
        object.__setattr__(alone, "readers", units.readers[number : number + 1])
        with expert_layers(model):
            scores = bh.score(model, {name: alone}, importance, BATCHES)[name]
        assert sorted(scores.argsort()[: len(lost)].tolist()) == lost.tolist()


@pytest.mark.parametrize("importance", [bh.OutputNorm(), bh.OBS()])
def test_a_streamed_model_in_bfloat16_loses_the_same_channels(importance, tmp_path):
    bh.save(build("qwen3_moe", moe_intermediate_size=64).bfloat16(), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()  # its rotary frequencies are float32
    streamed = bh.stream(tmp_path / "model", tmp_path / "small")
    plans = [bh.plan(each, importance, BATCHES, channels=0.25) for each in (model, streamed)]
    bh.apply(model, plans[0])
    bh.apply(streamed, plans[1])
    bh.save(streamed, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_optimizer_states_follow():
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters())
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    optimizer.step()
    experts = model.model.layers[0].mlp.experts
    averages = {name: optimizer.state[getattr(experts, name)]["exp_avg"] for name in ("gate_up_proj", "down_proj")}
    plan = bh.plan(model, batches=BATCHES, channels=0.25)
    bh.apply(model, plan, [optimizer])
    size = averages["down_proj"].shape[2]
    for number, lost in enumerate(plan.by_expert["model.layers.0.mlp.experts"]):
        kept = np.setdiff1d(np.arange(size), lost)
        now = {name: optimizer.state[getattr(experts, name)]["exp_avg"][number] for name in averages}
        assert torch.equal(now["down_proj"], averages["down_proj"][number][:, kept])
        assert torch.equal(now["gate_up_proj"], averages["gate_up_proj"][number][np.concatenate([kept, size + kept])])


def test_a_plan_of_other_channels_is_refused_and_masks_are_refused():
    model = build("mixtral")
    plan = bh.plan(model, batches=BATCHES, channels=0.25)
    with pytest.raises(ValueError, match="no single module consumes the channels of model.layers.0.mlp.experts"):
        bh.mask(model, plan)
    smaller = build("mixtral", intermediate_size=32)
    with pytest.raises(ValueError, match="other units"):
        bh.apply(smaller, plan)


@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_half_of_a_mixture_is_in_reach_of_a_search(layers):
    model = build("qwen3_moe", num_experts=8, moe_intermediate_size=64)
    size = model.num_parameters()
    outside = sum(value.numel() for name, value in model.named_parameters() if ".experts." not in name)
    limit = outside + (size - outside) // 2
    shrunk = bh.shrink(model, bh.Budget(params=limit), BATCHES, layers=layers, search=bh.Search(generations=1))
    assert model.num_parameters() == shrunk.left <= limit
    assert {name for name in shrunk.plan.units if name.endswith(".experts")} == set(shrunk.plan.by_expert)
    assert model(input_ids=tokens()).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("repaired", [False, True])
def test_a_candidate_of_a_search_computes_what_its_plan_does(repaired):
    model, ids = build("qwen3_moe"), tokens()
    plan = bh.plan(model, batches=BATCHES, channels=0.25, kv_heads=0.5)
    weights = bh.repair(model, plan, BATCHES) if repaired else None
    with simulated(model, ShrinkPlan(plan, weights=weights)):
        expected = model(input_ids=ids).logits
    bh.apply(model, plan, weights=weights)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_budget_takes_channels_of_experts():
    model = build("qwen3_moe", num_experts=8, moe_intermediate_size=64)
    limit = model.num_parameters() // 2
    plan = bh.plan(model, batches=BATCHES, params=limit)
    assert plan.parameters[1] <= limit
    assert set(plan.kinds[name] for name in plan.units) == {"channel"}


def test_scores_that_are_not_of_single_experts_remove_the_same_channels_from_all():
    model = build("mixtral")
    plan = bh.plan(model, bh.Taylor(), BATCHES, channels=0.25)
    assert not plan.by_expert
    scores = bh.score(model, bh.find_units(model, "channel"), bh.Taylor(), BATCHES)
    assert plan.units == {name: sorted(values.argsort()[: len(plan.units[name])].tolist()) for name, values in scores.items()}
