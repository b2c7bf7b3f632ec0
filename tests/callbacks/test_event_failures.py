"""An event that fails leaves model, optimizer and all else as they were and raises what happened; the fit can be run again."""

import signal
from contextlib import nullcontext
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaMLP

import billhook as bh
from kit import prunes, shrinks
from kit.families import llama
from kit.fits import same, trainer, weights
from kit.unharmed import HOOKS, Interrupt, differing, everything, interrupted

pytestmark = [pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "attention_dropout": 0.1}
STEPS = 4


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (count, 2, 8), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


class Module(pl.LightningModule):
    def __init__(self, optimizer="AdamW", **changes):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.optimizer = llama(**SIZES | changes).train(), optimizer
        self.model.model.layers[0].eval()
        self.model.model.norm.weight.requires_grad_(False)

    def training_step(self, batch, _):
        self.log("loss", loss := self.model(**batch).loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": trained[::2]}, {"params": trained[1::2], "lr": 2e-2}]
        if self.optimizer == "SGD":
            return torch.optim.SGD(groups, 1e-2, momentum=0.9)
        return torch.optim.AdamW(groups, 1e-2)


def seen(**options):
    return {"calibration": batches(), "measure_batches": 1, **options}


KINDS = {
    "wanda": lambda at: prunes.WeightPruning(bh.Wanda(), at.of(0.5), **seen(at=at.moment)),
    "sparsegpt": lambda at: prunes.WeightPruning(bh.SparseGPT(), at.of(0.5), **seen(at=at.moment, sequential="layer")),
    "magnitude": lambda at: bh.WeightPruning(bh.Magnitude(), at.of(0.5), at=at.moment, measure_batches=0),
    "heads": lambda at: bh.HeadPruning(at.of(0.5), **seen(at=at.moment, remove="rounds")),
    "masks": lambda at: bh.HeadPruning(at.of(0.5), **seen(at=at.moment, remove="never", importance=bh.Taylor())),
    "structure": lambda at: bh.StructuredPruning(bh.Amount(channels=0.5, kv_heads=0.5), **seen(at=at.schedule or at.moment)),
    "repaired": lambda at: bh.StructuredPruning(
        bh.Amount(channels=0.5), repair=bh.RepairConfig(), **seen(at=at.schedule or at.moment)
    ),
    "shrink": lambda at: shrinks.Shrinking(params=0.9, generations=0, **seen(at=at.moment, calibration=batches(4))),
    "depth": lambda at: bh.DepthPruning(1, **seen(at=at.moment)),
    "mean": lambda at: bh.KVHeadConversion(*at.stages, measure_batches=1),
    "svd": lambda at: bh.KVHeadConversion(*at.stages, method="svd", **seen()),
}


class At:
    """When: `"start"`, a step, or in two rounds."""

    def __init__(self, when):
        self.moment, self.rounds = ("start", True) if when == "rounds" else (when, False)

    def of(self, amount):
        return bh.schedules.MultiStep([amount / 2, amount], [1, 3]) if self.rounds else amount

    @property
    def schedule(self):
        return bh.schedules.MultiStep([0.5, 1.0], [1, 3]) if self.rounds else None

    @property
    def stages(self):
        return ([2, 1], [1, 3]) if self.rounds else (2, self.moment)


def build(kind, when):
    return KINDS[kind](At(when))


class Watched:
    """Runs the hooks of a callback, interrupted at one of billhook's calls in them, and compares what is then with what was."""

    def __init__(self, callback, at=0):
        self.callback, self.at, self.calls, self.differs, self.where, self.happened = callback, at, 0, None, "", False
        for name in ("on_train_start", "on_train_batch_end"):
            setattr(callback, name, self.around(getattr(callback, name)))

    def around(self, hook):
        def call(trainer, pl_module, *rest):
            before = [everything(pl_module, *trainer.optimizers, gradients=own) for own in (True, False)]
            events = len(self.callback.events)
            calls = [0, ""]
            try:
                with interrupted(self.at - self.calls) if self.at >= 0 else nullcontext(calls) as calls:
                    hook(trainer, pl_module, *rest)
            except BaseException:
                self.happened = len(self.callback.events) > events
                dropped = all(p.grad is None for p in pl_module.parameters())  # as the next step would have done
                self.differs = differing(before[dropped], everything(pl_module, *trainer.optimizers, gradients=not dropped))
                raise
            finally:
                self.calls, self.where = self.calls + calls[0], calls[1]

        return call

    def released(self):
        for name in ("on_train_start", "on_train_batch_end"):
            delattr(self.callback, name)
        return self.callback


def fit(folder, lit, *callbacks, ckpt_path=None):
    run = trainer(folder, list(callbacks), max_steps=STEPS, limit_val_batches=1, check_val_every_n_epoch=99)
    run.fit(lit, DataLoader(batches(1) * 8, batch_size=None), DataLoader(batches(1), batch_size=None), ckpt_path=ckpt_path)
    return run


def left_alone(lit, attributes):
    hooks = [name for part in lit.modules() for name in HOOKS if getattr(part, name)]
    return not hooks and set(vars(lit)) - {"_hparams"} == attributes - {"_hparams"}


def whole(lit, run):
    """Whether optimizers hold what the model has, and nothing else, with state of its size."""
    trained = {p for p in lit.parameters() if p.requires_grad}
    (optimizer,) = run.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = all(v.shape in (p.shape, ()) for p, own in optimizer.state.items() for v in own.values() if v is not None)
    return set(held) == trained and len(held) == len(trained) and set(optimizer.state) <= trained and sizes


@cache
def straight(folder, kind, when, optimizer, tied):
    """How many calls there are in all, and the weights and events that a run ends with."""
    lit, callback = Module(optimizer, tie_word_embeddings=tied), build(kind, when)
    watch = Watched(callback)
    fit(folder, lit, callback)
    return watch.calls, weights(lit), callback.events


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fits")


ANY = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
CONFIGURATIONS = {
    "kind": st.sampled_from(sorted(KINDS)),
    "when": st.sampled_from(["start", 2, "rounds"]),
    "optimizer": st.sampled_from(["AdamW", "SGD"]),
    "tied": st.booleans(),
    "share": st.floats(0, 1),
}


@pytest.mark.nightly
@settings(ANY, max_examples=10)
@given(**CONFIGURATIONS)
def test_an_interrupt_anywhere_in_an_event_leaves_all_as_it_was(folder, kind, when, optimizer, tied, share):
    calls, expected, events = straight(folder, kind, when, optimizer, tied)
    lit, callback = Module(optimizer, tie_word_embeddings=tied), build(kind, when)
    attributes, watch, runs = set(vars(lit)), Watched(callback, 1 + int(share * (calls - 1))), []
    callback.on_fit_start = keep(callback.on_fit_start, runs)
    try:
        fit(folder, lit, callback)
    except Interrupt:
        pass
    else:  # it would have come later than all that was left to do, with what is remembered of traces
        assert watch.where == ""
    assert not watch.differs or watch.happened, (watch.where, watch.differs)
    assert [(e["step"], e["what"]) for e in callback.events] == [(e["step"], e["what"]) for e in events[: len(callback.events)]]
    assert whole(lit, runs[0])
    assert left_alone(lit, attributes)
    again = Module(optimizer, tie_word_embeddings=tied)
    fit(folder, again, watch.released())
    assert same(weights(again), expected)


def keep(hook, runs):
    def call(trainer, pl_module):
        runs.append(trainer)
        hook(trainer, pl_module)

    return call


class Saves(pl.Callback):
    """A checkpoint of the moment of an error."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


@pytest.mark.daily("sparsegpt")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("kind", ["sparsegpt", "heads", "masks", "structure", "shrink", "depth", "svd"])
def test_what_was_saved_when_an_event_failed_goes_on_to_the_same_end(folder, tmp_path, kind):
    calls, expected, _ = straight(folder, kind, 2, "AdamW", False)
    watch = Watched(build(kind, 2), calls * 2 // 3)
    with pytest.raises(Interrupt):
        fit(folder, Module(), watch.callback, Saves(tmp_path / "failed.ckpt"))
    lit = Module()
    fit(folder, lit, watch.released(), ckpt_path=tmp_path / "failed.ckpt")
    assert same(weights(lit), expected)


FAILURES = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "arithmetic": FloatingPointError("of its own"),
}


@pytest.mark.daily("wanda-*", "*-memory")
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "kind", ["wanda", "sparsegpt", "heads", "masks", "structure", "repaired", "shrink", "depth", "svd", "mean"]
)
def test_a_forward_that_fails_says_so_itself(folder, kind, failure, monkeypatch):
    """In the first layer, after one forward in which the model was measured."""
    lit, watch, calls = Module(), Watched(build(kind, 2), -1), []
    forward = LlamaMLP.forward

    def fails(self, x):
        if "log" in vars(lit) and not x.is_meta:
            calls.append(0)
            if len(calls) == 3:
                raise FAILURES[failure]
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", fails)
    attributes = set(vars(lit))
    with pytest.raises(type(FAILURES[failure])) as raised:
        fit(folder, lit, watch.callback)
    assert raised.value is FAILURES[failure]
    assert watch.differs == [] or (kind == "mean" and watch.happened)
    assert left_alone(lit, attributes)


@pytest.mark.parametrize("kind", ["wanda", "magnitude", "heads", "structure", "shrink", "depth", "svd"])
def test_weights_that_are_no_numbers_are_refused(folder, kind):
    lit, watch = Module(), Watched(build(kind, 2), -1)
    with torch.no_grad():
        lit.model.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit(folder, lit, watch.callback)
    assert watch.differs == []


class Fails(bh.Wanda):
    error = LookupError("which is the least important?")

    def score(self, *given):
        raise self.error


class Stopped(Fails):
    error = KeyboardInterrupt()


@pytest.mark.parametrize("criterion", [Fails(), Stopped()], ids=["an error", "from the keyboard"])
def test_a_criterion_of_the_users_own(folder, criterion):
    lit, watch, handler = (
        Module(),
        Watched(prunes.WeightPruning(criterion, 0.5, **seen(at=2)), -1),
        signal.getsignal(signal.SIGINT),
    )
    try:
        with pytest.raises((LookupError, SystemExit)) as raised:
            fit(folder, lit, watch.callback)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert criterion.error in (raised.value, raised.value.__context__)
    assert watch.differs == []
    assert watch.callback.masks == {}


ONESHOT = {
    "wanda": lambda model, _: bh.prune(model, bh.Wanda(), batches(), 0.5),
    "sparsegpt": lambda model, _: prunes.prune(model, bh.SparseGPT(), batches(), 0.5, sequential="layer"),
    "magnitude": lambda model, _: bh.prune(model, bh.Magnitude(), sparsity=0.5),
    "mean": lambda model, optimizer: bh.convert_kv_heads(model, 2, optimizers=optimizer),
    "svd": lambda model, optimizer: bh.convert_kv_heads(
        model, 2, bh.kv_methods.SVD("similar"), batches(4), optimizer, bh.RepairConfig()
    ),
    "heads": lambda model, optimizer: bh.pruning.prune_units(model, {0: [0, 1], 1: [2, 3]}, optimizer),
    "blocks": lambda model, optimizer: bh.pruning.prune_units(model, [0], optimizer, kind="block"),
    "structure": lambda model, optimizer: bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.5), optimizer),
    "repaired": lambda model, optimizer: repaired(bh.plan(model, bh.importance.WeightNorm(), channels=0.5), model, optimizer),
}


def repaired(plan, model, optimizer):
    bh.apply(model, plan, optimizer, bh.repair(model, plan, batches(4)))


@cache
def calls_of(kind, optimizer, tied):
    lit = Module(optimizer, tie_word_embeddings=tied)
    for _ in range(2):  # the second finds what is remembered of the first
        lit = Module(optimizer, tie_word_embeddings=tied)
        with interrupted(0) as calls:
            ONESHOT[kind](lit.model, lit.configure_optimizers())
    return calls[0]


@settings(ANY, max_examples=6)
@given(kind=st.sampled_from(sorted(ONESHOT)), **{k: v for k, v in CONFIGURATIONS.items() if k in ("optimizer", "tied", "share")})
def test_an_interrupt_anywhere_without_a_trainer(kind, optimizer, tied, share):
    calls, lit = calls_of(kind, optimizer, tied), Module(optimizer, tie_word_embeddings=tied)
    model, trained_by = lit.model, lit.configure_optimizers()
    model(**batches()[0]).loss.backward()
    trained_by.step()
    before = everything(model, trained_by)
    with pytest.raises(Interrupt), interrupted(1 + int(share * (calls - 1))) as told:
        ONESHOT[kind](model, trained_by)
    assert differing(before, everything(model, trained_by)) == [], told
