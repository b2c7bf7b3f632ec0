"""RepairConfig of linears whose weights have been pruned: what is zero stays zero, and the rest makes up for what goes."""

import pytest
import torch

import billhook as bh
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.residuals import ResidualStatistics
from kit.families import llama, tokens


def seen(x, owed):
    found = ResidualStatistics(owed.shape[1], x.shape[1])
    found.add(x, owed)
    return found


def drawn(tokens=300, width=20, rows=7):
    torch.manual_seed(0)
    mix = torch.eye(width) + torch.randn(width, width) / width**0.5
    x = (torch.randn(tokens, width) @ mix + torch.randn(width)).double()
    return x, x @ torch.randn(width, rows).double() + torch.randn(tokens, rows).double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_each_row_is_least_squares_on_its_own_support(biased, ridge):
    (x, owed), weight = drawn(), torch.randn(7, 20).double()
    support = torch.rand(7, 20) < 0.6
    support[3] = False
    weight *= support
    bias, parts = torch.randn(7).double() if biased else None, [seen(x[:200], owed[:200]), seen(x[200:], owed[200:])]
    new, shift = refit_linear(weight, bias, parts, [ridge], support=support)
    mean, due = (x.mean(0), owed.mean(0)) if biased else (0.0, 0.0)
    for row, own in enumerate(support):
        scale = ((x - mean)[:, own].square().sum(0) * ridge).sqrt()
        left = torch.cat([(x - mean)[:, own], torch.diag(scale)])
        right = torch.cat([(owed - due)[:, row], torch.zeros(int(own.sum())).double()])
        torch.testing.assert_close(new[row, own], weight[row, own] + torch.linalg.lstsq(left, right[:, None]).solution[:, 0])
        assert not new[row, ~own].any()
    if biased:
        torch.testing.assert_close(shift, bias + owed.mean(0) - (new - weight) @ x.mean(0))


def test_where_it_helps_no_held_out_data_weights_stay():
    (x, owed), weight = drawn(), torch.randn(7, 20).double()
    support = torch.rand(7, 20) < 0.05  # on which nothing can be made up for that is elsewhere, too
    weight *= support
    parts = [seen(x[:200], owed[:200]), seen(x[200:], -owed[200:])]
    new, _ = refit_linear(weight, None, parts, [0.01, 1.0], support=support)
    assert torch.equal(new, weight)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_pruned_model_keeps_its_zeros_and_errs_less(pattern):
    torch.manual_seed(0)
    model, batches = llama(), [{"input_ids": tokens(6, 40)} for _ in range(6)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    bh.prune(model, bh.Magnitude(), sparsity=0.5, pattern=pattern)
    expected = [model(**batch).logits.detach() for batch in batches]
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25, heads=0.5)
    errors = []
    for weights in (None, bh.repair(model, plan, batches)):
        own = llama_as(model)
        bh.apply(own, plan, weights=weights)
        errors.append(sum((own(**batch).logits - there).square().sum() for batch, there in zip(batches, expected, strict=True)))
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for layer in own.model.layers:
                assert (layer.get_submodule(name).weight == 0).float().mean() > 0.4
    assert errors[1] < errors[0]


def llama_as(model):
    own = llama()
    own.load_state_dict(model.state_dict())
    return own


def test_a_few_zeros_by_rounding_change_nothing_of_the_refit():
    torch.manual_seed(0)
    model, batches = llama(), [{"input_ids": tokens(6, 40)} for _ in range(6)]
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25, heads=0.5)
    found = []
    for tiny in (1e-30, 0.0):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[0, :2] = tiny
        found.append(bh.repair(model, plan, batches))
    for name, old in found[0].items():
        torch.testing.assert_close(found[1][name], old)
