"""A repair against torch.linalg.lstsq and a plain loop over whole runs; it helps on unseen text, and changes no model."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.engine.batches import Run
from billhook.engine.comm import SINGLE_PROCESS
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.repairs.least_squares import choose_ridge, refit_linear, solve_ridge
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.repairs.residuals import ResidualStatistics
from kit.families import llama, tokens
from kit.losses import BUILD
from kit.ranks import Ranks


def refit(model, masks, runs, repair=None, comm=SINGLE_PROCESS, given=None, **more):
    """The new weight and bias of each linear; other parameters are given by linear and by their names in it."""
    others = None if given is None else LazyTensors.of(by_parameter(given))
    found = repair_linears(model, masks, runs, repair, comm, others, **more)
    return {name: (found.of_module(name)["weight"], found.of_module(name).get("bias")) for name in found.modules}


READERS = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "bert": ("output.dense",),
    "t5": (".o", ".wo"),
    "albert": ("attention.dense", "ffn_output"),
}

RIDGES = RepairConfig().ridges


def inputs(tokens=400, width=24, seed=0):
    torch.manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width) / width**0.5
    return (torch.randn(tokens, width) @ mix + torch.randn(width)).double()


def moments(*parts, owed=None):
    found = ResidualStatistics(10 if owed is None else owed.shape[-1], parts[0].shape[-1])
    for part in parts:
        found.add(part, owed)
    return found


def lacking(weight, keep, x, owed=0.0):
    """What a linear is left with when inputs go: those kept, and what it owes in addition to their part."""
    return x[..., keep], x[..., ~keep] @ weight[:, ~keep].to(x).t() + owed


def refitted(weight, bias, keep, fit, held_out, ridges):
    """Refits what is kept to moments of it; zero for the rest."""
    new = torch.zeros_like(weight)
    new[:, keep], bias = refit_linear(weight[:, keep], bias, [fit, held_out], ridges)
    return new, bias


def kept(width, gone, seed=1):
    torch.manual_seed(seed)
    return torch.ones(width, dtype=torch.bool).index_fill_(0, torch.randperm(width)[:gone], False)


def by_lstsq(weight, keep, x, ridge, owed=0.0, counts=None):
    """Stacks the ridge under the data, and solves that."""
    target, each = x @ weight.t() + owed, torch.ones(len(x), 1).double() if counts is None else counts[:, None]
    scale = ((x[:, keep].square() * each).sum(0) * ridge).sqrt()
    left = torch.cat([x[:, keep] * each.sqrt(), torch.diag(scale)])
    right = torch.cat([target * each.sqrt(), (weight[:, keep] * scale).t()])
    new = torch.zeros_like(weight)
    new[:, keep] = torch.linalg.lstsq(left, right).solution.t()
    return new


def test_a_ridge_too_small_for_moments_without_an_inverse_is_skipped():
    """Rounding has made the moments indefinite: the smaller ridges have no solution, the larger do, or none does."""
    x, weight, keep = inputs(), torch.randn(10, 24, dtype=torch.float64), kept(24, 7)
    fit, held_out = moments(x[:300]), moments(x[300:])
    products = fit.products
    products -= 0.005 * x[:300].square().mean() * 300 * torch.ones(24, 24) + 0.2 * torch.diag(products.diagonal())
    parts = [part.after_removal(weight, keep) for part in (fit, held_out)]
    solved = [ridge for ridge in RIDGES if solve_ridge(parts[:1], False, ridge).isfinite().all()]
    assert 0 < len(solved) < len(RIDGES)
    assert choose_ridge(parts, False, RIDGES) in {*solved, math.inf}
    new, _ = refit_linear(weight, None, [fit, held_out], RIDGES)
    assert new.isfinite().all()
    nearly = (1000 + 0.001 * x).float().split(300)
    constant = [moments(own, owed=due) for own, due in (lacking(weight, keep, one) for one in nearly)]
    new, bias = refitted(weight, torch.zeros(10).double(), keep, *constant, RIDGES)
    torch.testing.assert_close(new, torch.where(keep, weight, 0))
    torch.testing.assert_close(bias, weight[:, ~keep] @ (1000 + 0.001 * x.mean(0))[~keep], rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("owing", [False, True])
@pytest.mark.parametrize("ridge", [1e-9, 0.01, 1.0])
def test_the_closed_form_is_the_least_squares_solution(ridge, owing):
    x, weight, keep = inputs(), torch.randn(10, 24, dtype=torch.float64), kept(24, 7)
    owed = torch.randn(400, 10).double() + x[:, :10] if owing else torch.zeros(400, 10).double()
    own, due = lacking(weight, keep, x, owed)
    seen = [moments(own[:100], owed=due[:100]), moments(own[100:], owed=due[100:])]
    new = weight[:, keep] + solve_ridge(seen, False, ridge)
    torch.testing.assert_close(new, by_lstsq(weight, keep, x, ridge, owed)[:, keep], rtol=1e-8, atol=1e-8)


def test_a_bias_makes_up_for_means():
    x, keep = inputs(), kept(24, 7)
    weight, bias, owed = torch.randn(10, 24).double(), torch.randn(10).double(), torch.randn(400, 10).double() + x[:, :10]
    own, due = lacking(weight, keep, x, owed)
    fit, held_out = moments(own[:300], owed=due[:300]), moments(own[300:], owed=due[300:])
    found, shift = refitted(weight, bias, keep, fit, held_out, [1e-9])
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x[:, keep], ones], 1), x @ weight.t() + bias + owed).solution.t()
    torch.testing.assert_close(found[:, keep], expected[:, :-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift, expected[:, -1], rtol=1e-6, atol=1e-6)


def test_moments_of_parts_and_padding_are_those_of_the_whole():
    x = inputs(tokens=2100)
    counts = torch.rand(3, 700) < 0.7
    padded = torch.where(counts[..., None], x.reshape(3, 700, 24), torch.nan)
    owed = padded[..., :10] + torch.randn(3, 700, 10)
    found = ResidualStatistics(10, 24)
    found.add(padded, owed, counts)
    own, due = x.reshape(3, 700, 24)[counts], owed[counts]
    assert int(found.tokens) == int(counts.sum())
    torch.testing.assert_close(found.products, own.t() @ own)
    torch.testing.assert_close(found.residual_products, due.t() @ own)
    more, shift = torch.randn(10, 24).double(), torch.randn(10).double()
    for some in (more, torch.zeros_like(more)):
        error = (due - own @ some.t() - shift).square().sum() / len(own)
        torch.testing.assert_close(found.error(some if some.any() else None, shift), error)


def test_moments_of_the_inputs_that_are_kept_owe_what_the_others_gave():
    x, weight, keep = inputs(), torch.randn(10, 24).double(), kept(24, 7)
    own, due = lacking(weight, keep, x)
    for found, expected in zip(moments(x).after_removal(weight, keep).tensors(), moments(own, owed=due).tensors(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_token_that_counts_twice_is_one_that_is_there_twice():
    x, owed, counts = inputs(tokens=60), torch.randn(60, 10).double(), torch.randint(0, 4, (60,))
    found = ResidualStatistics(10, 24)
    found.add(x, owed, weights=counts.double())
    expected = moments(x.repeat_interleave(counts, 0), owed=owed.repeat_interleave(counts, 0))
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_token_that_is_owed_a_thousand_times_as_much_does_not_decide_alone():
    """The refit is near that without the token, where plain least squares is far from it."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1).double()
    name, batches = "model.layers.0.self_attn.o_proj", [{"input_ids": tokens(6, 40)} for _ in range(4)]
    others, masks = other_parameters(model, ("v_proj",)), {name: torch.ones(32, dtype=torch.bool)}

    def found():
        (own,) = refit(model, masks, trials(model, batches), RepairConfig(ridges=[0.01]), given=others).values()
        return own[0]

    without, start = found(), model.get_submodule(name).weight.detach().clone()
    value = model.model.layers[0].self_attn.v_proj
    hook = value.register_forward_hook(lambda _, args, out: out + 1e3 * (args[0].sum(-1, keepdim=True) > 9.0) * out.roll(1, -1))
    large = found()
    hook.remove()
    assert (large - without).norm() < (without - start).norm()


def test_the_ridge_is_the_one_that_errs_least_on_held_out_data():
    ridges, chosen = [0.0001, 0.01, 0.1, 1.0, 10.0], set()
    weight, keep, new = torch.randn(10, 24).double(), kept(24, 7), inputs(seed=3, tokens=2000)
    late = new[:, :10] + torch.randn(2000, 10)
    for number in (20, 60, 2000):
        x = new.flip(0)[:number] + 0.5 * torch.randn(number, 24)
        owed = x[:, :10] + torch.randn(number, 10)
        fit, held_out = (
            moments(seen, owed=due) for seen, due in (lacking(weight, keep, x, owed), lacking(weight, keep, new, late))
        )
        errors = [(new @ (weight - by_lstsq(weight, keep, x, ridge, owed)).t() + late).norm() for ridge in ridges]
        chosen.add(choose_ridge([fit, held_out], False, ridges))
        assert choose_ridge([fit, held_out], False, ridges) == ridges[int(torch.stack(errors).argmin())]
    assert len(chosen) > 1
    unlike = moments(torch.randn(500, 24).double() * torch.where(keep, 1, 1e-3)).after_removal(weight, keep)
    assert choose_ridge([moments(inputs(tokens=8)).after_removal(weight, keep), unlike], False, ridges) == float("inf")


def case(family, number=4, length=40):
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.double()
    linears = {n: m for n, m in model.named_modules() if n.endswith(READERS[family]) and isinstance(m, nn.Linear | Conv1D)}
    masks = {n: kept(width_of(m), width_of(m) // 4, seed) for seed, (n, m) in enumerate(linears.items())}
    batches = [{"input_ids": tokens(6, length)} for _ in range(number)]
    if family == "t5":
        batches = [batch | {"labels": tokens(6, 20)} for batch in batches]
    return model, masks, batches


def width_of(linear):
    return linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]


def trials(model, batches, masks=None):
    return [Run(lambda batch=batch: model(**batch).logits.sum(), masks or {}) for batch in batches]


def matrix(linear, weight):
    return weight.t() if isinstance(linear, Conv1D) else weight


def put(model, new):
    with torch.no_grad():
        for name, (weight, bias) in new.items():
            model.get_submodule(name).weight.copy_(weight)
            if bias is not None:
                model.get_submodule(name).bias.copy_(bias)


def given(model, name, batches):
    """What a linear is given in whole runs of the model, by batch, and in how many calls."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen[-1].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            seen.append([])
            model(**batch)
    hook.remove()
    return [torch.cat(calls) for calls in seen], len(seen[0])


def outputs(model, name, batch):
    """What a linear gives in a whole run."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output.detach().flatten(0, -2)))
    model(**batch)
    hook.remove()
    return torch.cat(seen)


def streams(model, name, batches):
    """Of a block of Llama or GPT-2, the residual stream before and after what a linear adds to it, by batch."""
    block = model.get_submodule(name.rsplit(".", 2)[0])
    middle = block.post_attention_layernorm if hasattr(block, "post_attention_layernorm") else block.ln_2
    seen = {"start": [], "middle": [], "end": []}
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen["start"].append(args[0].flatten(0, 1))),
        middle.register_forward_pre_hook(lambda _, args: seen["middle"].append(args[0].flatten(0, 1))),
        block.register_forward_hook(lambda _, args, out: seen["end"].append(out.flatten(0, 1))),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return (seen["start"], seen["middle"]) if "attn" in name else (seen["middle"], seen["end"])


def slowly(model, masks, batches, repair, others=None):
    """The same, from whole runs of a model in which all linears before have their new weights, and some others from the start."""
    whole, model, order, result = model, copy.deepcopy(model), [], {}
    put(model, {name: (own["weight"], own.get("bias")) for name, own in (others or {}).items()})
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: name in order or order.append(name))
        for name in masks
    ]
    model(**batches[0])
    for hook in hooks:
        hook.remove()
    choosing = repair.held_out_batches(len(batches))
    for name in order:
        linear, keep = model.get_submodule(name), masks[name]
        x, _ = given(model, name, batches)
        old = matrix(linear, linear.weight.detach())
        fit, held_out = (ResidualStatistics(len(old), int(keep.sum())) for _ in range(2))
        target, start = (
            (streams(whole, name, batches)[1], streams(model, name, batches)[0]) if repair.compensate else (None, None)
        )
        dues, squares = [], []
        for number, one in enumerate(x):
            own = one @ old.t() + (0 if linear.bias is None else linear.bias.detach())
            owed = target[number] - start[number] - own if repair.compensate else None
            if others and not repair.compensate:
                owed = outputs(whole, name, batches[number]) - own
            dues.append(owed)
            _, due = lacking(old, keep, one, 0.0 if owed is None else owed)
            squares.append(None if owed is None else due.square().sum(-1))
        some = [math.log(number) for one in squares if one is not None for number in one.tolist()]
        usual = math.exp(sum(some) / len(some)) if some else 0.0
        for number, (one, owed, square) in enumerate(zip(x, dues, squares, strict=True)):
            weights = 2 * usual / (usual + square) if usual else None
            left = lacking(old, keep, one, 0.0 if owed is None else owed)
            (held_out if number in choosing else fit).add(*left, None, weights)
        new, bias = refitted(old, linear.bias, keep, fit, held_out, repair.ridges)
        result[name] = (matrix(linear, new), None if bias is None else bias.detach())
        put(model, {name: result[name]})
    return result


@pytest.mark.parametrize(("family", "compensate", "gap"), [
    ("llama", True, False),
    ("llama", True, True),
    ("gpt2", True, False),
    *((one, False, False) for one in BUILD if one != "albert"),
])  # fmt: skip
def test_linear_after_linear_on_what_the_repaired_ones_before_give(family, compensate, gap):
    model, masks, batches = case(family)
    if gap:  # the attention of the second layer stands between two that change, and follows
        del masks["model.layers.1.self_attn.o_proj"]
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    found = refit(model, masks, trials(model, batches), RepairConfig(compensate))
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    model.eval()
    expected = slowly(model, masks, batches, RepairConfig(compensate))
    assert found.keys() == masks.keys() == expected.keys()
    changed = 0
    for name, (weight, bias) in found.items():
        linear = model.get_submodule(name)
        assert weight.shape == linear.weight.shape
        assert (bias is None) == (linear.bias is None)
        assert not matrix(linear, weight)[:, ~masks[name]].any()
        torch.testing.assert_close(weight, expected[name][0], rtol=1e-6, atol=1e-8)
        changed += not torch.equal(matrix(linear, weight)[:, masks[name]], matrix(linear, linear.weight)[:, masks[name]])
        if bias is not None:
            torch.testing.assert_close(bias, expected[name][1], rtol=1e-6, atol=1e-8)
    assert changed > len(masks) / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def other_parameters(model, ends, share=0.5):
    """New parameters for linears of some names, not far from the old ones."""
    generator = torch.Generator().manual_seed(9)
    linears = {
        name: module for name, module in model.named_modules() if name.endswith(ends) and isinstance(module, nn.Linear | Conv1D)
    }
    return {
        name: {
            one: value.detach() + share * value.std().detach() * torch.randn(value.shape, generator=generator).to(value)
            for one, value in module.named_parameters()
        }
        for name, module in linears.items()
    }


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_other_parameters_linear_after_linear_as_in_whole_runs(family, compensate):
    model, masks, batches = case(family)
    masks = {name: torch.ones_like(keep) for name, keep in masks.items()}
    others = other_parameters(model, ("v_proj", "q_proj", "layers.0.self_attn.o_proj") if family == "llama" else ("c_attn",), 0.2)
    before = copy.deepcopy(model.state_dict())
    found = refit(model, masks, trials(model, batches), RepairConfig(compensate), given=others)
    expected = slowly(model, masks, batches, RepairConfig(compensate), others)
    assert found.keys() == masks.keys()
    assert sum(not torch.equal(weight, model.get_submodule(name).weight) for name, (weight, _) in found.items()) >= 2
    for name, (weight, bias) in found.items():
        torch.testing.assert_close(weight, expected[name][0], rtol=1e-5, atol=1e-7)
        if bias is not None:
            torch.testing.assert_close(bias, expected[name][1], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_linears_before_the_first_do_not_give_is_made_up_for():
    """As where the first block goes: what writes its outputs is zero, and nothing of it is refitted."""
    model, masks, batches = case("llama")
    first = [name for name in masks if ".layers.0." in name]
    others = {name: {"weight": torch.zeros_like(model.get_submodule(name).weight)} for name in first}
    masks = {name: torch.ones_like(keep) for name, keep in masks.items() if name not in first}
    found = refit(model, masks, trials(model, batches), given=others)
    expected = slowly(model, masks, batches, RepairConfig(), others)
    assert any(not torch.equal(weight, model.get_submodule(name).weight) for name, (weight, _) in found.items())
    for name, (weight, _) in found.items():
        torch.testing.assert_close(weight, expected[name][0], rtol=1e-5, atol=1e-7)


def test_other_parameters_that_cannot_be_are_refused():
    model, masks, batches = case("llama")
    name, runs = "model.layers.0.self_attn.v_proj", trials(model, batches)
    weight = model.get_submodule(name).weight.detach()
    for wrong, message in (
        ({"model.norm": {"weight": weight}}, r"new_params: 'model.norm' is not an nn.Linear or Conv1D of the model"),
        (
            {name: {"weight": weight[:3]}},
            r"new_params\['\S+v_proj'\] must have the shapes {'weight': \[16, 32\]}, got {'weight': \[3, 32\]}",
        ),
        (
            {name: {"weight": weight, "bias": weight[:, 0]}},
            r"must have the shapes {'weight': \[16, 32\]}, got {'weight': .*'bias': \[16\]}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refit(model, masks, runs, given=wrong)
    model, masks, batches = case("albert")
    with pytest.raises(
        ValueError, match=r"repair: .* is called several times in a run, so it cannot be compared with the dense model"
    ):
        refit(model, masks, trials(model, batches), given=other_parameters(model, "value"))


def test_a_linear_that_is_called_in_every_layer_is_refitted_on_all_calls():
    model, masks, batches = case("albert")
    found = refit(model, masks, trials(model, batches), RepairConfig(ridges=[0.01]))
    cut = copy.deepcopy(model)
    for name, keep in masks.items():
        cut.get_submodule(name).weight.data[:, ~keep] = 0
    for name, keep in masks.items():
        x, calls = given(cut, name, batches)
        assert calls == 3
        linear = model.get_submodule(name)
        fit, held_out = (ResidualStatistics(len(linear.weight), int(keep.sum())) for _ in range(2))
        for number, one in enumerate(x):
            (fit if number < 2 else held_out).add(*lacking(linear.weight.detach(), keep, one))
        weight, bias = refitted(linear.weight.detach(), linear.bias.detach(), keep, fit, held_out, [0.01])
        torch.testing.assert_close(found[name], (weight, bias), rtol=1e-6, atol=1e-8)


def test_padding_does_not_count():
    model, masks, batches = case("bert")
    mask = torch.arange(40).expand(6, 40) < torch.tensor([[40], [15], [9], [30], [22], [18]])
    padded = [batch | {"attention_mask": mask.long()} for batch in batches]
    counts = dict.fromkeys(masks, mask)
    one = refit(model, masks, trials(model, padded, counts))
    for batch in padded:
        batch["input_ids"] = torch.where(mask, batch["input_ids"], 7)
    other = refit(model, masks, trials(model, padded, counts))
    blind = refit(model, masks, trials(model, padded))
    for name in masks:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11)
        assert not torch.allclose(one[name][0], blind[name][0], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_keeps_its_dtype(dtype):
    model, masks, batches = case("llama")
    model = model.to(dtype)
    found = refit(model, masks, trials(model, batches))
    assert all(weight.dtype == dtype and weight.isfinite().all() for weight, _ in found.values())


SPLITS = {
    "as many": lambda rank, ranks: slice(rank, None, ranks),
    "one rank has all": lambda rank, ranks: slice(0 if rank == ranks - 1 else 9, 9),
}
"""Which of some batches a rank has."""


@pytest.mark.parametrize(
    ("number", "ranks", "split", "sources"),
    [(2, 2, "as many", ""), (2, 2, "one rank has all", "ab"), (5, 4, "one rank has all", "ab"), (3, 4, "as many", "ab")],
)
def test_ranks_together_come_to_what_one_comes_to_alone(number, ranks, split, sources):
    """Also if some have no batches; the same ones choose the ridge."""
    model, masks, batches = case("gpt2", number=number)
    names = [sources[place % 2 : place % 2 + 1] for place in range(number)]

    def runs(own, of=slice(None)):
        return [replace(run, source=name) for run, name in zip(trials(own, batches[of]), names[of], strict=True)]

    alone = refit(model, masks, runs(model), RepairConfig(held_out=0.5))
    copies = [copy.deepcopy(model) for _ in range(ranks)]

    def one(rank, reduce):
        own = runs(copies[rank], SPLITS[split](rank, ranks))
        return refit(copies[rank], masks, own, RepairConfig(held_out=0.5), reduce)

    found = Ranks(ranks).run(one)
    for name, own in alone.items():
        for other in found:
            torch.testing.assert_close(own, other[name], rtol=1e-7, atol=1e-9)


def test_some_batches_of_all_ranks_choose_whatever_their_source():
    def parts(counts, rank, comm):
        return RepairConfig(held_out=0.5).parts(counts[rank], comm)

    assert Ranks(2).run(partial(parts, [2, 1])) == [[1, 1], [0]]
    assert Ranks(2).run(partial(parts, [2, 0])) == [[0, 1], []]
    with pytest.raises(ValueError, match="needs at least two batches.* got 1"):
        Ranks(2).run(partial(parts, [1, 0]))


def test_an_expert_that_few_tokens_come_to_is_only_cut_and_named():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, chosen):
            return sum(self.experts[e](x[: 3 if e == 1 else len(x)]).sum() for e in chosen)

    model = Routed()
    masks = {f"experts.{e}": kept(8, 3, e) for e in range(3)}
    calls = [(inputs(40, 8).float(), [0, 1]) for _ in range(2)]
    runs, left = [Run(lambda call=call: model(*call)) for call in calls], []
    with pytest.warns(UserWarning, match=r"1 linear layer was not repaired, because it had too few tokens: experts\.2"):
        found = refit(model, masks, runs, not_refitted=left)
    assert left == ["experts.2"]
    assert torch.equal(found["experts.2"][0], model.experts[2].weight * masks["experts.2"])
    assert torch.equal(found["experts.2"][1], model.experts[2].bias)
    assert not torch.equal(found["experts.0"][0], model.experts[0].weight * masks["experts.0"])
    with pytest.raises(ValueError, match=r"repair of experts\.2 needs at least \d+ non-padding tokens, got \d+"):
        refit(model, {"experts.2": masks["experts.2"]}, runs)


def test_too_few_tokens_are_refused_before_the_walk():
    model, masks, batches = case("llama", number=2, length=2)
    runs = trials(model, [{"input_ids": batch["input_ids"][:1]} for batch in batches])
    with pytest.raises(ValueError, match=r"repair of .*o_proj needs at least 24 non-padding tokens, got 4"):
        refit(model, masks, runs)
    padded = {name: torch.arange(40).lt(1).expand(6, 40) for name in masks}
    with pytest.raises(ValueError, match=r"repair of .*o_proj needs at least 24 non-padding tokens, got 12"):
        refit(model, masks, trials(model, [{"input_ids": tokens(6, 40)}] * 2, padded))


def test_refusals_name_what_came_and_change_nothing():
    model, masks, batches = case("llama")
    name, keep = next(iter(masks.items()))
    runs = trials(model, batches)
    for wrong, message in (
        ({"model.norm": keep}, "'model.norm' is LlamaRMSNorm in LlamaForCausalLM, not an nn.Linear"),
        ({"nowhere": keep}, "'nowhere' is nothing in LlamaForCausalLM"),
        ({name: keep[:-1]}, r"must be bool of shape \[32\] .* got torch.bool of shape \[31\]"),
        ({name: keep.float()}, "got torch.float32"),
        ({name: torch.zeros_like(keep)}, "0 kept"),
        ({}, "kept is empty. Name at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            refit(model, wrong, runs)
    with pytest.raises(ValueError, match="repair needs at least two batches.* got 1"):
        refit(model, masks, runs[:1])
    with pytest.raises(ValueError, match="held_out=1 must be in .0, 1."):
        RepairConfig(held_out=1)
    with pytest.raises(ValueError, match="ridges=.0.0, 1.0. must be one or more finite numbers of at least 0.0001"):
        RepairConfig(ridges=(0.0, 1.0))
    model.model.layers[1].mlp.up_proj.weight.data[5] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj: 1 input features contain NaN or infinity, the first is feature 5"
    ):
        refit(model, masks, runs)
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
SMALL |= {"intermediate_size": 24, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_routers_are_linears_that_return_what_they_have_chosen():
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SMALL, num_experts_per_tok=2)).eval()
    batches = [{"input_ids": tokens(2, 24)} for _ in range(4)]
    plan = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(heads=0.5, round_to=1))
    assert {name.rsplit(".", 2)[-2] for name in bh.repair(model, plan, batches)} >= {"o_proj"}
    bh.convert_kv_heads(model, 2, batches=batches, repair=bh.RepairConfig())


def test_something_stands_between_a_linear_and_the_sum_it_adds_to():
    """The linear is refitted as where it alone loses inputs."""
    model, batches = llama(num_hidden_layers=3), [{"input_ids": tokens(2, 40)} for _ in range(4)]
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
    name = next(iter(plan.units))
    alone = bh.repair(model, bh.pruning.plan_units(model, {name: plan.units[name]}, kind="channel"), batches)
    whole = bh.repair(model, plan, batches)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out + 0)
    found = bh.repair(model, plan, batches)
    hook.remove()
    assert found.keys() == whole.keys()
    first = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(found[first], alone[first], atol=1e-5)


def test_where_channels_that_go_are_copies_of_others_nothing_is_lost():
    model, masks, batches = case("llama", number=8)
    masks = {name: keep for name, keep in masks.items() if name.endswith("down_proj")}
    for number, keep in enumerate(masks.values()):
        mlp, (gone,) = model.model.layers[number].mlp, torch.where(~keep)
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data[gone] = part.weight.data[keep][: len(gone)]
    with torch.no_grad():
        whole = model(**batches[0]).logits
        new = refit(model, masks, trials(model, batches), RepairConfig(ridges=[1e-4]))
        cut = copy.deepcopy(model)
        put(cut, {name: (cut.get_submodule(name).weight * keep, None) for name, keep in masks.items()})
        put(model, new)
        missing, lost = ((one(**batches[0]).logits - whole).norm() / whole.norm() for one in (model, cut))
    assert missing < 1e-3
    assert lost > 0.1
