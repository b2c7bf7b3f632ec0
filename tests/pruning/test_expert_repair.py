"""Output matrices of experts after repair, against least squares by hand, and what repair must leave as it is."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

import billhook as bh
from billhook.repairs.residuals import NoRepair
from kit.families import build, tokens
from kit.ranks import Ranks
from kit.sparsity import family

RIDGE = 0.3
BATCHES = [{"input_ids": tokens(6, 16)} for _ in range(4)]
WITHOUT_ERRORS = bh.RepairConfig(compensate=False, ridges=[RIDGE], held_out=0.25)


@torch.no_grad()
def calls(model):
    """Inputs, chosen experts and gates of the first mixture, by batch."""
    found = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args))
    for batch in BATCHES:
        model(**batch)
    hook.remove()
    return found


def outputs(experts, hidden, chosen, gates):
    """Output and hidden activations of each expert, weighed by the gates; float64, zero for other tokens."""
    result = []
    for number, (up, down) in enumerate(zip(experts.gate_up_proj.double(), experts.down_proj.double(), strict=True)):
        gate, linear = (hidden.double() @ up.T).chunk(2, -1)
        activations = silu(gate) * linear * (gates.double() * (chosen == number)).sum(-1, keepdim=True)
        result.append((activations, activations @ down.T))
    return result


def ridge_solution(inputs, missing, batches):
    x, r = (torch.cat([part[batch] for batch in batches]) for part in (inputs, missing))
    gram = x.T @ x
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().diag(), x.T @ r).T


@torch.no_grad()
@pytest.mark.parametrize("what", ["channels", "experts"])
def test_matrices_are_those_of_least_squares_one_after_the_other(what):
    """The ridge penalty is taken where it lowers the error on the batch that is held out."""
    model = build("qwen3_moe")
    plan = bh.plan(model, batches=BATCHES, **{what: 0.25})
    weights = bh.repair(model, plan, BATCHES, WITHOUT_ERRORS)
    experts, layer = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts"
    cut = copy.deepcopy(model)
    bh.apply(cut, plan)
    fits = [number not in WITHOUT_ERRORS.held_out_batches(4) for number in range(4)]
    small, missing, routed = cut.model.layers[0].mlp.experts, [], []
    for dense, pruned in zip(calls(model), calls(cut), strict=True):
        of_experts = outputs(small, *pruned)
        routed.append(of_experts)
        missing.append(sum(out for _, out in outputs(experts, *dense)) - sum(out for _, out in of_experts))
    for number, matrix in enumerate(small.down_proj):
        inputs = [of_experts[number][0] for of_experts in routed]

        change = ridge_solution(inputs, missing, [i for i, fit in enumerate(fits) if fit])
        held_out = [(inputs[i], missing[i]) for i, fit in enumerate(fits) if not fit]
        helps = sum((r - x @ change.T).square().sum() - r.square().sum() for x, r in held_out) < 0
        change = ridge_solution(inputs, missing, range(4)) if helps else torch.zeros_like(change)
        missing = [r - x @ change.T for r, x in zip(missing, inputs, strict=True)]
        whole = weights[f"{layer}.down_proj"]
        if what == "channels":
            kept = np.setdiff1d(np.arange(whole.shape[2]), plan.by_expert[layer][number])
            assert not whole[number][:, plan.by_expert[layer][number]].any()
            found = whole[number][:, kept]
        else:
            found = whole[np.setdiff1d(np.arange(len(whole)), plan.units["model.layers.0.mlp"])[number]]
        torch.testing.assert_close(found.double(), matrix.double() + change, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.daily("mixtral-amount0", "qwen3_moe-amount1", "gpt_oss-amount2")
@pytest.mark.parametrize("amount", [{"channels": 0.25}, {"experts": 0.25}, {"experts": 0.25, "channels": 0.25, "kv_heads": 0.5}])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"])
def test_repair_brings_blocks_nearer_and_leaves_the_model_as_it_is(name, amount):
    model = family(name)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    batches = [{"input_ids": tokens(8, 16)} for _ in range(4)]
    before, modules = copy.deepcopy(model.state_dict()), list(model.named_modules())
    plan = bh.plan(model, batches=batches, **amount)
    weights = bh.repair(model, plan, batches)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    errors = []
    for new in (None, weights):
        smaller = copy.deepcopy(model)
        bh.apply(smaller, plan, weights=new)
        hidden = [each(**batch, output_hidden_states=True).hidden_states[1:] for batch in batches for each in (model, smaller)]
        pairs = [(a, b) for dense, cut in zip(hidden[::2], hidden[1::2], strict=True) for a, b in zip(dense, cut, strict=True)]
        errors.append(sum((a - b).square().sum() for a, b in pairs))
    assert errors[1] < errors[0]


@torch.no_grad()
@pytest.mark.parametrize("amount", [{"experts": 0.5}, {"experts": 0.5, "channels": 0.25}])
def test_matching_lowers_the_error_of_a_block_further(amount):
    model, batches, errors = family("qwen3_moe"), [{"input_ids": tokens(16, 32)} for _ in range(6)], []
    plan = bh.plan(model, batches=batches, **amount)
    for match in (None, bh.criteria.BlockMatching(steps=40, held_out=0.25)):
        smaller = copy.deepcopy(model)
        bh.apply(smaller, plan, weights=bh.repair(model, plan, batches, bh.RepairConfig(match=match)))
        pairs = [[each(**batch, output_hidden_states=True).hidden_states[1] for each in (model, smaller)] for batch in batches]
        errors.append(sum(((a - b).square().sum(-1) / a.square().sum(-1)).sum() for a, b in pairs))
    assert errors[1] < errors[0]


def test_padding_counts_nothing():
    model = build("mixtral")
    plan = bh.plan(model, batches=BATCHES, channels=0.25)
    padded = []
    for batch in BATCHES:
        ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
        garbage = torch.cat([ids, tokens(6, 4)], 1), torch.cat([mask, torch.zeros_like(mask[:, :4])], 1)
        padded.append(dict(zip(("input_ids", "attention_mask"), garbage, strict=True)))
    expected, found = (bh.repair(model, plan, batches) for batches in (BATCHES, padded))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_ranks_find_the_matrices_of_one_process():
    model = build("mixtral")
    plan = bh.plan(model, batches=BATCHES, experts=0.25)
    alone = bh.repair(model, plan, BATCHES)
    shares = [BATCHES[0::2], BATCHES[1::2]]

    def on_rank(rank, reduce):
        return bh.repair(copy.deepcopy(model), plan, shares[rank], reduce=reduce)

    for found in Ranks(2).run(on_rank):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_repaired_is_refused(tmp_path):
    model = build("mixtral")
    plan = bh.plan(model, batches=BATCHES, experts=0.25)
    with pytest.raises(NoRepair, match="at least two batches"):
        bh.repair(model, plan, BATCHES[:1])
    bh.save(model, tmp_path / "model")
    streamed = bh.stream(str(tmp_path / "model"))
    with pytest.raises(NoRepair, match="experts of a streamed or sharded model cannot be refitted"):
        bh.repair(streamed, bh.plan(streamed, batches=BATCHES, experts=0.25), BATCHES)


def test_nothing_changes_if_repair_fails(monkeypatch):
    model = build("mixtral")
    plan, modules, before = (
        bh.plan(model, batches=BATCHES, experts=0.25),
        list(model.named_modules()),
        copy.deepcopy(model.state_dict()),
    )

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("billhook.pruning.expert_repair.refit_linear", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        bh.repair(model, plan, BATCHES)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for _, module in modules)


@torch.no_grad()
def test_zeros_of_sparse_experts_stay():
    model = build("mixtral")
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    plan = bh.plan(model, batches=BATCHES, experts=0.25)
    weights = bh.repair(model, plan, BATCHES)
    for name, value in weights.items():
        assert not value[model.get_parameter(name) == 0].any()
        assert not torch.equal(value[value != 0], model.get_parameter(name)[value != 0])
