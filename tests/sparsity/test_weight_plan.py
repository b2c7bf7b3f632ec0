"""A plan of weights is plain data: written, read again and applied, it does to the model what pruning does at once."""

import copy
import json

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model.layers import prunable
from billhook.model.plan import ModelPlan, apply
from billhook.sparsity.weight_plan import WeightPlan
from kit.events import Own, loader
from kit.fits import trainer
from kit.sparsity import batches_of, family


@pytest.mark.daily("llama-*", "gpt2-refit-dtype1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "criterion", [bh.Wanda(), bh.criteria.Refit(), bh.SparseGPT(block_size=16)], ids=["wanda", "refit", "sparsegpt"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_read_does_what_was_planned(name, criterion, dtype):
    model = family(name).to(dtype).eval()
    batches = batches_of(model)
    plan = bh.prune(model, criterion, batches, 0.5, dry_run=True)
    text = json.dumps(plan.to_json())
    for read in (ModelPlan, WeightPlan):
        again, other = read.from_json(json.loads(text), model), copy.deepcopy(model)
        assert str(again) == str(plan)
        assert json.dumps(again.to_json()) == text
        apply(other, again)
    bh.prune(model, criterion, batches, 0.5)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.other = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.called(x)


def test_linears_that_were_not_called_are_named_in_json_too():
    model = Partly()
    with pytest.warns(UserWarning, match="no calibration batch called 1 linear layer"):
        plan = bh.prune(model, bh.Wanda(), [torch.randn(5, 8)], 0.5, dry_run=True)
    again = WeightPlan.from_json(plan.to_json(), model)
    assert again.uncalled == ("other",)
    assert again.shapes == plan.shapes
    assert plan.sparsity == again.sparsity == 32 / 96


def test_new_values_come_first_and_go_with_an_error():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    plan, before = bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    model.load_state_dict(before)
    state = {parameter: dict(own) for parameter, own in optimizer.state.items()}
    new = {"0.weight": torch.randn(8, 8)}
    broken = WeightPlan.from_json(plan.to_json(), model)
    broken.pruned["1"] = None
    with pytest.raises(AttributeError):
        apply(model, broken, optimizer, new)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply(model, plan, optimizer, new)
    assert torch.equal(model[0].weight, new["0.weight"] * plan.masks(model)["0"])
    assert all(one[key] is own[key] for parameter, own in state.items() for one in [optimizer.state[parameter]] for key in own)


class TestRefused:
    @pytest.fixture
    def plain(self):
        return bh.prune(nn.Sequential(nn.Linear(8, 8)), bh.Magnitude(), sparsity=0.5, dry_run=True).to_json()

    @pytest.mark.parametrize(("change", "match"), [
        ({"kind": "zeros"}, "its kind is 'zeros', and must be one of .*weights"),
        ({"pruned": {"0": {"shape": [8, 8], "bits": "AA=="}}}, "1 bytes of bits for 64 weights"),
        ({"pruned": {"0": {"shape": [8, 8], "bits": "?"}}}, "was not written by WeightPlan.to_json"),
        ({"pruned": {"0": {"shape": [8, 8]}}}, "KeyError: 'bits'"),
        ({"pruned": [3]}, "was not written by WeightPlan.to_json"),
        ({"uncalled": 7}, "was not written by WeightPlan.to_json"),
        (
            {"pruned": {"0": {"shape": [2, 2], "bits": "8A==", "values": "AAAA", "dtype": "float16"}}},
            "was not written by WeightPlan",
        ),
        (
            {"pruned": {"0": {"shape": [2, 2], "bits": "8A==", "values": "AAA=", "dtype": "float16"}}},
            "1 values for 4 kept weights",
        ),
        ({"pruned": {"0": {"shape": [2, 2], "bits": "8A==", "values": "AAA=", "dtype": "int8"}}}, "KeyError: 'int8'"),
    ])  # fmt: skip
    def test_what_is_no_plan(self, plain, change, match):
        with pytest.raises(ValueError, match=match):
            ModelPlan.from_json(plain | change, nn.Sequential(nn.Linear(8, 8)))

    def test_another_model(self, plain):
        with pytest.raises(ValueError, match=r"belongs to another model: 0 has shape \(8, 8\) in the plan and \(4, 8\) here"):
            ModelPlan.from_json(plain, nn.Sequential(nn.Linear(8, 4)))


def test_sparsity_counts_experts_that_stay_dense(tmp_path):
    """In the plan, in JSON, and in the metrics of a fit."""
    lit = Own()
    lit.net = family("llama4_text").train()
    experts = {name: value for name, value in lit.net.named_parameters() if value.dim() == 3}
    linear = sum(layer.weight.numel() for layer in prunable(lit.net).values())
    expected = 0.5 * linear / (linear + sum(value.numel() for value in experts.values()))
    with pytest.warns(UserWarning, match="these weights hold several matrices"):
        plan = bh.prune(lit.net, bh.Magnitude(), sparsity=0.5, dry_run=True)
    assert set(plan.unsupported) == set(experts)
    assert plan.sparsity == WeightPlan.from_json(plan.to_json(), lit.net).sparsity == pytest.approx(expected, abs=1e-3)
    callback = bh.WeightPruning(bh.Magnitude(), sparsity=0.5, measure_batches=0)
    with pytest.warns(UserWarning, match="these weights hold several matrices"):
        trainer(tmp_path, [callback], max_steps=1).fit(lit, loader(), loader(4, 4))
    assert callback.events[0]["after"]["sparsity"] == plan.sparsity
    assert callback.metrics(lit.net)["sparsity"] == pytest.approx(plan.sparsity, abs=1e-3)
