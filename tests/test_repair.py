"""Repair against torch.linalg.lstsq and a plain loop over whole runs; it helps on text it has not seen, and changes no model."""

import copy
import itertools

import pytest
import torch
import transformers
from families import SMALL, llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.structure.least_squares import Moments, choose_ridge, refit, refit_linear
from billhook.structure.probes import Trial
from billhook.structure.repair import Repair, repaired

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}
ALBERT = BERT | {"embedding_size": 16, "num_hidden_layers": 3}
BUILD = {
    "llama": llama,
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**ALBERT)),
}
READERS = {
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "bert": ("output.dense",),
    "t5": (".o", ".wo"),
    "albert": ("attention.dense", "ffn_output"),
}


def inputs(tokens=400, width=24, seed=0):
    torch.manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width) / width**0.5
    return (torch.randn(tokens, width) @ mix + torch.randn(width)).double()


def moments(*parts):
    found = Moments(parts[0].shape[-1])
    for part in parts:
        found.add(part)
    return found


def kept(width, gone, seed=1):
    torch.manual_seed(seed)
    return torch.ones(width, dtype=torch.bool).index_fill_(0, torch.randperm(width)[:gone], False)


def by_lstsq(weight, keep, x, ridge):
    """Stacks the ridge under the data, and solves that."""
    scale = x[:, keep].square().mean(0).sqrt() * ridge**0.5 * len(x) ** 0.5
    left = torch.cat([x[:, keep], torch.diag(scale)])
    right = torch.cat([x @ weight.t(), (weight[:, keep] * scale).t()])
    new = torch.zeros_like(weight)
    new[:, keep] = torch.linalg.lstsq(left, right).solution.t()
    return new


@pytest.mark.parametrize("ridge", [1e-9, 0.01, 1.0])
def test_the_closed_form_is_the_least_squares_solution(ridge):
    x, weight, keep = inputs(), torch.randn(10, 24, dtype=torch.float64), kept(24, 7)
    new = refit(weight, keep, moments(x).about(), ridge)
    torch.testing.assert_close(new, by_lstsq(weight, keep, x, ridge), rtol=1e-8, atol=1e-8)
    assert torch.equal(new[:, ~keep], torch.zeros(10, 7, dtype=torch.float64))


def test_a_bias_makes_up_for_means():
    x, keep = inputs(), kept(24, 7)
    weight, bias = torch.randn(10, 24, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    found, shift = refit_linear(weight, bias, keep, moments(x[:300]), moments(x[300:]), [1e-9])
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x[:, keep], ones], 1), x @ weight.t() + bias).solution.t()
    torch.testing.assert_close(found[:, keep], expected[:, :-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shift, expected[:, -1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((x @ found.t() + shift).mean(0), (x @ weight.t() + bias).mean(0))


def test_moments_of_parts_and_padding_are_those_of_the_whole():
    x = inputs(tokens=2100)
    counts = torch.rand(3, 700) < 0.7
    padded = torch.where(counts[..., None], x.reshape(3, 700, 24), torch.nan)
    found = Moments(24)
    found.add(padded, counts)
    own, centre = x.reshape(3, 700, 24)[counts], torch.randn(24, dtype=torch.float64)
    assert int(found.tokens) == int(counts.sum())
    torch.testing.assert_close(found.about(centre), (own - centre).t() @ (own - centre) / len(own))
    both = moments(x[:50]).merged(moments(x[50:]))
    torch.testing.assert_close(both.about(), x.t() @ x / len(x))


def test_the_ridge_is_the_one_that_errs_least_on_held_out_data():
    ridges = [0.0001, 0.01, 0.1, 1.0, 10.0]
    weight, keep, new = torch.randn(10, 24, dtype=torch.float64), kept(24, 7), inputs(seed=3, tokens=2000)
    for number in (20, 60, 2000):
        x = inputs(seed=3, tokens=2000).flip(0)[:number] + 0.5 * torch.randn(number, 24, dtype=torch.float64)
        found = choose_ridge(weight, keep, moments(x).about(), moments(new).about(), ridges)
        errors = [(new @ (weight - by_lstsq(weight, keep, x, ridge)).t()).norm() for ridge in ridges]
        assert found == ridges[int(torch.stack(errors).argmin())]
    unlike = moments(torch.randn(500, 24, dtype=torch.float64) * torch.where(keep, 1, 1e-3))
    assert choose_ridge(weight, keep, moments(inputs(tokens=8)).about(), unlike.about(), ridges) == float("inf")


def case(family, number=4, length=24):
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.double()
    linears = {n: m for n, m in model.named_modules() if n.endswith(READERS[family]) and isinstance(m, nn.Linear | Conv1D)}
    masks = {n: kept(width_of(m), width_of(m) // 4, seed) for seed, (n, m) in enumerate(linears.items())}
    batches = [{"input_ids": tokens(3, length)} for _ in range(number)]
    if family == "t5":
        batches = [batch | {"labels": tokens(3, 20)} for batch in batches]
    return model, masks, batches


def width_of(linear):
    return linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]


def trials(model, batches, masks=None):
    return [Trial(lambda batch=batch: model(**batch).logits.sum(), masks or {}, lambda: []) for batch in batches]


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


def slowly(model, masks, batches, repair):
    """The same, from whole runs of a model in which all linears before have their new weights."""
    model, order, result = copy.deepcopy(model), [], {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: name in order or order.append(name))
        for name in masks
    ]
    model(**batches[0])
    for hook in hooks:
        hook.remove()
    choosing = repair.chooses(len(batches))
    for name in order:
        linear, keep = model.get_submodule(name), masks[name]
        x, _ = given(model, name, batches)
        fit = moments(*[one for number, one in enumerate(x) if number not in choosing])
        held_out = moments(*[one for number, one in enumerate(x) if number in choosing])
        old = matrix(linear, linear.weight.detach())
        new, bias = refit_linear(old, linear.bias, keep, fit, held_out, repair.ridges)
        result[name] = (matrix(linear, new), None if bias is None else bias.detach())
        put(model, {name: result[name]})
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_linear_after_linear_on_what_the_repaired_ones_before_give(family):
    model, masks, batches = case(family)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    found = repaired(model, masks, trials(model, batches))
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    model.eval()
    expected = slowly(model, masks, batches, Repair())
    assert found.keys() == masks.keys() == expected.keys()
    for name, (weight, bias) in found.items():
        linear = model.get_submodule(name)
        assert weight.shape == linear.weight.shape
        assert (bias is None) == (linear.bias is None)
        assert not matrix(linear, weight)[:, ~masks[name]].any()
        torch.testing.assert_close(weight, expected[name][0], rtol=1e-6, atol=1e-8)
        if bias is not None:
            torch.testing.assert_close(bias, expected[name][1], rtol=1e-6, atol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_a_linear_that_is_called_in_every_layer_is_refitted_on_all_calls():
    model, masks, batches = case("albert")
    found = repaired(model, masks, trials(model, batches), Repair(ridges=[0.01]))
    cut = copy.deepcopy(model)
    for name, keep in masks.items():
        cut.get_submodule(name).weight.data[:, ~keep] = 0
    for name, keep in masks.items():
        alone = copy.deepcopy(cut)
        alone.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)
        x, calls = given(alone, name, batches)
        assert calls == 3
        linear = model.get_submodule(name)
        weight, bias = refit_linear(linear.weight.detach(), linear.bias.detach(), keep, moments(*x[:2]), moments(*x[2:]), [0.01])
        torch.testing.assert_close(found[name], (weight, bias), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_where_inputs_that_go_are_combinations_of_others_nothing_is_lost(family):
    model, masks, batches = case(family, number=8, length=48)
    for (name, _), keep in zip(list(masks.items()), masks.values(), strict=True):
        double(model, name, keep)
    with torch.no_grad():
        whole = [model(**batch).logits for batch in batches]
        put(model, repaired(model, masks, trials(model, batches), Repair(ridges=[1e-4])))
        repaired_ones = [model(**batch).logits for batch in batches]
    for one, other in zip(whole, repaired_ones, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-2 * float(one.std()))
