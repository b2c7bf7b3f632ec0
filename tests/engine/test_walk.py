"""The walk sees what a slower way sees: the whole model run anew for every site, with all sites before it already changed."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_configs import architectures, build, small_config
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.engine.state import evaluating_without_grad
from billhook.engine.walk import Visitor, Walk, find_sites
from kit.sparsity import batches_of

FAMILIES = [
    "llama",
    "gemma3_text",
    "gpt2",
    "falcon",
    "bert",
    "t5",
    "bart",
    "whisper",
    "vit",
    "swin",
    "mamba",
    "gpt_neox",
    "mixtral",
    "xlm",
]
UNCALLED = {
    "mamba": ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"]
}  # its weight is used, not its forward
STACKS = {"llama": 2, "gpt2": 2, "bert": 2, "t5": 4, "bart": 4, "vit": 2}


def case(family):
    torch.manual_seed(0)
    _, _, config_class, model_class = max(architectures(family), key=lambda one: "Seq2Seq" in one[0])
    model = build(small_config(config_class), model_class).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n}
    return model, linears, batches_of(model)


class Halve(Visitor):
    """Adds up what linears are given, and halves the columns that were given most."""

    def __init__(self):
        self.sums, self.order, self.new = {}, [], {}

    def observe(self, name, linear, inputs, run):
        self.sums[name] = self.sums.get(name, 0) + inputs.double().square().flatten(0, -2).sum(0)

    def complete(self, site):
        self.order.append(site)
        for name, linear in site.linears.items():
            if name in self.sums:
                self.new[name] = halved(linear, self.sums[name])

    def parameters(self, site):
        return {name: {"weight": self.new[name]} for name in site.linears if name in self.new}


def halved(linear, sums):
    columns = torch.where(sums > sums.median(), 0.5, 1.0).to(linear.weight.dtype)
    return linear.weight.data * (columns[:, None] if isinstance(linear, Conv1D) else columns)


def slowly(model, sites, batches):
    """The same sums, from one run of the whole model a site."""
    model, sums = copy.deepcopy(model), {}
    modules = dict(model.named_modules())
    for names in sites:
        own = {}

        def hook(name, own=own):
            def add(_, args):
                own[name] = own.get(name, 0) + args[0].double().square().flatten(0, -2).sum(0)

            return add

        with contextlib.ExitStack() as stack:
            for name in names:
                stack.callback(modules[name].register_forward_pre_hook(hook(name)).remove)
            with torch.no_grad():
                for batch in batches:
                    model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
        for name in own:
            modules[name].weight.data = halved(modules[name], own[name])
        sums |= own
    return sums


@pytest.mark.daily("*-block", "llama-*", "t5-*", "gpt2-*")
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_linears_are_given(family, sequential):
    model, linears, batches = case(family)
    sites = find_sites(model, linears, sequential)
    if sequential == "block" and family in STACKS:
        blocks = [site for site in sites if len(site.linears) > 1]
        assert len(blocks) == STACKS[family]
    visitor, before = Halve(), {name: linear.weight.clone() for name, linear in linears.items()}
    with evaluating_without_grad(model):
        unseen = Walk(sites, visitor)([lambda batch=batch: model(**batch) for batch in batches])
    expected = slowly(model, [list(site.linears) for site in visitor.order], batches)
    assert unseen == (UNCALLED.get(family, []) if sequential == "layer" else [])
    assert visitor.sums.keys() == expected.keys()
    for name, sums in expected.items():
        torch.testing.assert_close(visitor.sums[name], sums, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(linear.weight, before[name]) for name, linear in linears.items())


def test_everything_is_as_before_after_an_exception():
    model, linears, batches = case("llama")
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    threads = threading.active_count()

    class Fails(Halve):
        def complete(self, site):
            super().complete(site)
            torch.rand(3)
            if len(self.order) == 2:
                raise OSError("disk full")

    before = {name: linear.weight.clone() for name, linear in linears.items()}
    with pytest.raises(OSError, match="disk full"), evaluating_without_grad(model):
        Walk(find_sites(model, linears, "block"), Fails())([lambda batch=batch: model(**batch) for batch in batches])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.config.use_cache
    assert torch.is_grad_enabled()
    assert threading.active_count() == threads
    assert all(torch.equal(linear.weight, before[name]) for name, linear in linears.items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_what_another_thread_calls_runs_straight():
    """As a forward that is computed again in backward, which autograd does in a thread of its own for each GPU."""
    model, linears, batches = case("llama")
    called = []

    class Recomputing(Halve):
        def complete(self, site):
            with ThreadPoolExecutor(1) as other:
                found = other.submit(torch.no_grad()(model), **batches[0]).result()
            called.append(torch.equal(found.logits, model(**batches[0]).logits))
            super().complete(site)

    with evaluating_without_grad(model):
        Walk(find_sites(model, linears, "block"), Recomputing())([lambda batch=batch: model(**batch) for batch in batches])
    assert called == [True] * 2


def test_an_error_in_the_models_own_code_comes_out():
    model, linears, _ = case("llama")
    with pytest.raises(IndexError), evaluating_without_grad(model):
        Walk(find_sites(model, linears, "block"), Halve())([lambda: model(input_ids=torch.tensor([[10**6]]))])
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
