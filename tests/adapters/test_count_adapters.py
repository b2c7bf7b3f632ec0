"""Pruning with the adapter counted in: the masks that the merged model would get, on the base weights alone."""

import copy
import warnings
from dataclasses import dataclass

import peft
import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model.layers import prunable, weight_of
from billhook.sparsity.criteria import WandaAlpha
from billhook.sparsity.masks import sparsity_of
from kit import prunes
from kit.adapters import BUILD, lora, q_proj
from kit.families import llama, tokens
from kit.sparsity import CRITERIA

PREFIX = "base_model.model."


def adapted(build="llama", **options):
    torch.manual_seed(0)
    return lora(BUILD[build](), **options)


def batches_for(model):
    more = {"decoder_input_ids": tokens(2, 8)} if model.config.is_encoder_decoder else {}
    return [{"input_ids": tokens(2, 8), **more} for _ in range(3)]


def plain(masks):
    return {name.removeprefix(PREFIX): mask for name, mask in masks.items()}


def same_but_for_ties(masks, expected, few=0.002):
    """Sums in another order may swap scores that are next to each other."""
    assert masks.keys() == expected.keys()
    differing = sum(int((masks[name] != mask).sum()) for name, mask in expected.items())
    return differing <= few * sum(mask.numel() for mask in expected.values())


CASES = [
    (bh.Magnitude(), {"sparsity": 0.5}),
    (bh.Magnitude(compares="global"), {"sparsity": 0.5}),
    (bh.Wanda(), {"sparsity": 0.5}),
    (bh.Wanda(), {"sparsity": 0.5, "sequential": "layer"}),
    (bh.Wanda(compares="global"), {"sparsity": 0.5, "sequential": "none"}),
    (bh.criteria.RIA(), {"pattern": "2:4"}),
    (WandaAlpha(), {"sparsity": 0.5, "allocation": bh.criteria.OWL()}),
]


@pytest.mark.daily("*-llama", "Wanda(compares='row')-{'sparsity': 0.5}-*", "RIA*-t5")
@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize(("criterion", "settings"), CASES, ids=str)
def test_masks_are_those_of_the_merged_model(build, criterion, settings):
    model = adapted(build)
    batches, before = batches_for(model), copy.deepcopy(model.state_dict())
    merged = copy.deepcopy(model).merge_and_unload()
    expected = prunes.prune(merged, criterion, batches, **settings).masks(merged)
    without = plain(prunes.prune(model, criterion, batches, **settings, dry_run=True).masks(model))
    masks = plain(prunes.prune(model, criterion, batches, **settings, count_adapters=True).masks(model))
    assert same_but_for_ties(masks, expected)
    assert not same_but_for_ties(masks, without, 0.02)
    for name, linear in prunable(model).items():
        old = before.pop(f"{name}.base_layer.weight")
        assert torch.equal(linear.weight, old * masks[name.removeprefix(PREFIX)])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    result = bh.training.merge(model)
    zeros = {name: linear.weight == 0 for name, linear in prunable(result.model).items()}
    assert all(torch.equal(zeros[name], ~mask) for name, mask in masks.items())


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_scores_by_hand(build):
    """The lowest of |W + scale B A|, from the matrices themselves."""
    model = adapted(build, lora_alpha=6)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear))
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    scores = (weight_of(layer.base_layer) + 6 / 4 * (b @ a)).abs()
    gone = scores.flatten().argsort()[: scores.numel() // 2]
    mask = bh.prune(model, bh.Magnitude(), sparsity=0.5, count_adapters=True).masks(model)[name]
    mask = mask.t() if build == "gpt2" else mask
    assert sorted((~mask).flatten().nonzero().flatten().tolist()) == sorted(gone.tolist())


def test_scores_are_in_float32():
    """What the adapter adds to equal weights in bfloat16 is far below their rounding, and decides all the same."""
    model = adapted(target_modules=["q_proj"]).bfloat16()
    layer = q_proj(model)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1)
        layer.lora_B["default"].weight.mul_(1e-3)
    added = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    assert torch.equal(1 + added.bfloat16(), torch.ones_like(added))
    skip = ["*k_proj", "*v_proj", "*o_proj", "*mlp*", "*.1.*"]
    with torch.autocast("cpu", torch.bfloat16):
        pruning = prunes.prune(model, bh.Magnitude(compares="row"), sparsity=0.5, skip=skip, count_adapters=True)
    (mask,) = pruning.masks(model).values()
    assert torch.equal(mask, added >= added.sort(dim=1).values[:, 16:17])
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_only_what_the_forward_uses_counts():
    model = adapted(target_modules=["q_proj", "up_proj"])
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for active in (["default"], ["two"], ["default", "two"]):
        model.base_model.set_adapter(active)
        merged = copy.deepcopy(model).merge_and_unload()
        expected = bh.prune(merged, bh.Magnitude(), sparsity=0.5, dry_run=True).masks(merged)
        masks = bh.prune(model, bh.Magnitude(), sparsity=0.5, count_adapters=True, dry_run=True).masks(model)
        assert same_but_for_ties(plain(masks), expected)
    with model.disable_adapter(), pytest.raises(ValueError, match="count_adapters=True: no adapter is active, for example on"):
        bh.prune(model, bh.Magnitude(), sparsity=0.5, count_adapters=True, dry_run=True)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_pruned_stays_so_when_there_is_more(masked):
    model = adapted()
    first = bh.prune(model, bh.Magnitude(compares="row"), sparsity=0.4, count_adapters=True).masks(model)
    if masked:
        bh.training.mask_adapters(model)
    batches = batches_for(model)
    second = bh.prune(model, bh.Wanda(), batches, 0.6, count_adapters=True).masks(model)
    assert all((second[name] <= mask).all() for name, mask in first.items())
    assert sparsity_of(second.values()) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_masked_adapters_count_as_they_are_masked(build):
    """Also where the weight is not zero."""
    model = adapted(build)
    linears = prunable(model)
    bh.training.mask_adapters(model, {name: torch.rand(linear.weight.shape) < 0.5 for name, linear in linears.items()})
    merged = copy.deepcopy(model).merge_and_unload()
    expected = bh.prune(merged, bh.Magnitude(), sparsity=0.5).masks(merged)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5, count_adapters=True).masks(model)
    assert same_but_for_ties(plain(masks), expected)


def test_linears_without_adapters_are_pruned_as_ever():
    model = adapted(target_modules=["q_proj"])
    expected = bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True).masks(model)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5, count_adapters=True, dry_run=True).masks(model)
    assert {name for name in masks if not torch.equal(masks[name], expected[name])} == {n for n in masks if "q_proj" in n}


@dataclass(frozen=True)
class Sly(bh.Magnitude):
    """A criterion that changes kept weights and does not say so."""

    def prune(self, weight, *args):
        pruned, keep = super().prune(weight, *args)
        return 2 * pruned, keep


class TestRefused:
    """Before anything has changed."""

    def refused(self, model, match, criterion=None, **options):
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings(), pytest.raises(ValueError, match=match):
            prunes.prune(model, criterion or bh.Magnitude(), batches_for(model), 0.5, count_adapters=True, **options)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    @pytest.mark.parametrize("criterion", [bh.SparseGPT(), bh.criteria.Refit()])
    def test_criteria_that_update_weights(self, criterion):
        name = type(criterion).__name__
        self.refused(adapted(), rf"count_adapters=True needs a criterion .*, unlike {name}. Merge .* or omit", criterion)

    def test_criteria_that_do_so_unsaid(self):
        self.refused(adapted(), r"q_proj: Sly changes kept weights although its `updates` is False", Sly())

    def test_no_adapters(self):
        self.refused(llama(), "count_adapters=True requires LoRA adapters")

    def test_adapters_on_others_alone(self):
        model = adapted(target_modules=["q_proj"])
        self.refused(model, "count_adapters=True requires LoRA on the pruned layers; it is only on", skip=["*q_proj"])

    def test_adapters_merged_already(self):
        model = adapted()
        model.merge_adapter()
        self.refused(model, r"count_adapters=True: the adapters of .*q_proj are merged. Unmerge")

    def test_other_kinds(self):
        model = adapted(use_dora=True)
        self.refused(
            model, r"count_adapters=True: the adapter of .*q_proj must be plain LoRA .*, got LoRA with DoraLinearVariant"
        )
        loha = peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
        self.refused(loha, "count_adapters=True: the adapter of .* must be plain LoRA without bias, got Linear")


def test_which_criteria_update():
    weight, inputs = torch.randn(8, 16), torch.randn(64, 16)
    for kind in CRITERIA:
        criterion = kind()
        statistics = criterion.statistics(16)
        if statistics is not None:
            statistics.add(inputs)
        pruned, keep = criterion.prune(nn.Parameter(weight), statistics, 0.5)
        assert criterion.updates == (not torch.equal(pruned[keep], weight[keep])), kind
