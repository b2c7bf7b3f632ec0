"""After an event every new parameter moves in the next step; optimizers that could not have it move are refused before."""

import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Muon, RMSprop
from torch.optim.swa_utils import AveragedModel

import billhook as bh
from kit.families import llama, tokens
from kit.fits import same, trainer, weights
from kit.sharding import Own
from kit.unharmed import differing, everything

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, of its own torch.jit.script
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer, _apply_optimizer_in_backward

CHANNELS, HEADS = {0: [0, 1, 2], 1: [3, 4, 5]}, {0: [0, 1], 1: [2, 3]}


def grown(model):
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()


def trained(make):
    model = llama().train()
    optimizer = make([p for p in model.parameters() if p.ndim == 2])
    grown(model)
    getattr(optimizer, "optimizer", optimizer).step()
    return model, optimizer


FOLLOW = {
    "SGD": lambda own: SGD(own, 0.1, momentum=0.9),
    "AdamW": lambda own: AdamW(own, 0.1),
    "AdamW, foreach": lambda own: AdamW(own, 0.1, foreach=True),
    "AdamW, fused": lambda own: AdamW(own, 0.1, fused=True),
    "Adagrad, fused": lambda own: Adagrad(own, 0.1, fused=True),
    "Adafactor": lambda own: Adafactor(own, 0.1),
    "Muon": lambda own: Muon(own, 0.1),
    "Lightning's": lambda own: LightningOptimizer(AdamW(own, 0.1)),
    "PostLocalSGD": lambda own: PostLocalSGDOptimizer(
        AdamW(own, 0.1), type("No", (), {"average_parameters": lambda self, params: None})()
    ),
}


@pytest.mark.filterwarnings("ignore:Adafactor keeps .* it cannot follow")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", FOLLOW)
def test_every_new_parameter_moves_in_the_next_step(kind, scaled):
    model, optimizer = trained(FOLLOW[kind])
    bh.pruning.prune_units(model, CHANNELS, optimizer, kind="channel")
    bh.convert_kv_heads(model, 2, optimizers=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grown(model)
    optimizer = optimizer.optimizer if kind == "Lightning's" else optimizer
    if scaled and kind != "PostLocalSGD":
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.ndim == 2 and torch.equal(p, before[name])] == []


class Around(torch.optim.Optimizer):
    """An optimizer around another one, which has groups of its own."""

    def __init__(self, own):
        super().__init__(own, {})
        self.inner = [AdamW([p for group in self.param_groups for p in group["params"]], 0.1)]

    def step(self):
        self.inner[0].step()


class Listed(SGD):
    """It has a list of its parameters besides."""

    def __init__(self, own):
        super().__init__(own, 0.1)
        self.order = {"all": list(self.param_groups[0]["params"])}


class Copies(SGD):
    """Another optimizer steps copies in float32."""

    def __init__(self, own):
        super().__init__(own, 0.1)
        self.wide = AdamW([p.detach().clone().requires_grad_() for p in self.param_groups[0]["params"]])


REFUSED = {
    "ZeroRedundancyOptimizer": lambda own: ZeroRedundancyOptimizer(own, AdamW, lr=0.1),
    "LBFGS": lambda own: torch.optim.LBFGS(own),
    "Around": Around,
    "Listed": Listed,
    "Copies": Copies,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_optimizer_that_holds_parameters_elsewhere_is_refused(kind, mesh):
    model = llama()
    optimizer = REFUSED[kind](model.parameters())
    before = everything(model, optimizer)
    for change in (
        lambda: bh.pruning.prune_units(model, HEADS, optimizer),
        lambda: bh.pruning.prune_units(model, [0], optimizer, kind="block"),
        lambda: bh.convert_kv_heads(model, 2, optimizers=[optimizer]),
        lambda: bh.convert_kv_heads(model, 2, "svd", optimizers=[optimizer]),
    ):
        with pytest.raises(ValueError, match=f"^optimizers: {kind} .*Use a plain optimizer"):
            change()
    assert set(differing(before, everything(model, optimizer))) <= {"module "}  # which remembers a trace


@pytest.mark.parametrize("hook", ["in backward", "after", "on gradients"])
def test_parameters_with_hooks_of_their_own_are_refused(hook):
    model = llama()
    name = "model.layers.0.self_attn.k_proj.weight"
    own = model.get_parameter(name)
    if hook == "in backward":
        _apply_optimizer_in_backward(SGD, [own], {"lr": 0.1})
    elif hook == "after":
        own.register_post_accumulate_grad_hook(print)
    else:
        own.register_hook(print)
    for change in (lambda: bh.pruning.prune_units(model, HEADS), lambda: bh.convert_kv_heads(model, 2)):
        with pytest.raises(ValueError, match=f"{name} has (a gradient hook|hooks)"):
            change()
    assert model.get_parameter(name) is own


BESIDE = {
    "its own": "replaces parameters, but Chosen.extra .SGD. would keep the old ones",
    "an average": "replaces parameters, but Chosen.extra .AveragedModel. would keep the old ones",
}


class Chosen(Own):
    def __init__(self, kind):
        super().__init__()
        self.make = REFUSED.get(kind, AdamW)
        if kind == "its own":
            self.extra = SGD(self.net.parameters(), 0.1)
        if kind == "an average":
            self.extra = AveragedModel(self.net.lm_head)

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize("event", [
    lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, calibration=2, measure_batches=0),
    lambda: bh.DepthPruning(1, at=1, calibration=2, measure_batches=0),
    lambda: bh.KVHeadConversion(2, at=1, measure_batches=0),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["ZeroRedundancyOptimizer", "Around", *BESIDE])
def test_they_are_refused_before_training(tmp_path, event, kind, mesh):
    lit = Chosen(kind)
    before, callback = weights(lit), event()
    message = BESIDE.get(kind, f"{kind} .*Use a plain")
    with pytest.raises(ValueError, match=f"^{type(callback).__name__}:? {message}"):
        trainer(tmp_path, [callback], max_steps=2, limit_val_batches=0).fit(lit)
    assert same(weights(lit), before)


class Unsure(type(bh.kv_methods.Mean())):
    def changes(self, model, parameters):
        def fails(key, value):
            raise LookupError(key)

        return {name: replace(one, state=fails) for name, one in super().changes(model, parameters).items()}


def test_state_that_cannot_follow_starts_anew_with_a_warning():
    """The model has changed by then, and its optimizer goes on with all of it."""
    model, optimizer = trained(lambda own: RMSprop(own, 0.1))
    with pytest.warns(
        UserWarning, match=r"RMSprop keeps 'square_avg' of .*_proj.weight, .*\(LookupError: square_avg\), .* restarts"
    ):
        bh.convert_kv_heads(model, 2, Unsure(), optimizers=optimizer)
    assert model.get_parameter("model.layers.0.self_attn.k_proj.weight") not in optimizer.state
    assert {p for group in optimizer.param_groups for p in group["params"]} == {p for p in model.parameters() if p.ndim == 2}
