"""Every callback beside every feature of a Trainer: events happen at their step, and training goes on as it would."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import billhook as bh
from kit.events import DENSE, END, EVENTS, FEW, Own, close, figures, fit, loader, same_after_reload
from kit.families import recompute
from kit.fits import same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
]
CONVERSIONS = [event for event in EVENTS if event not in ("wanda", "masked")]


class Sizes(pl.Callback):
    """How large the gradients are that a step is taken with: of all parameters there are, none is left out."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        def note(*_):
            self.seen.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))

        trainer.optimizers[0].register_step_post_hook(note)


@pytest.mark.parametrize("event", EVENTS)
def test_all_gradients_are_clipped(tmp_path, event):
    sizes = Sizes()
    fit(tmp_path, event, more=[sizes], gradient_clip_val=0.1)
    assert sizes.seen == pytest.approx([0.1] * 4, rel=1e-3)


@pytest.mark.daily("wanda", "structure")
@pytest.mark.parametrize("event", [event for event in EVENTS if event != "polished"])  # Adam's first steps enlarge rounding
def test_accumulated_batches_are_as_one_larger_batch(tmp_path, event, monkeypatch):
    """Wherever in a batch that is accumulated the event might fall, it comes after the step."""
    monkeypatch.setitem(FEW, "calibration", list(loader(4)))
    lit, _, watch = fit(tmp_path, event, max_steps=3, accumulate_grad_batches=2)
    other, *_ = fit(tmp_path, event, max_steps=3, train=loader(4))
    assert [step for step, _ in watch.seen] == [0, 0, 1, 1, 2, 2]
    assert close(lit, other, atol=2e-4)


@pytest.mark.daily("wanda", "structure")
@pytest.mark.parametrize("event", EVENTS)
def test_gradient_checkpointing_changes_nothing(tmp_path, event):
    lit = Own()
    recompute(lit.net)
    lit, *_ = fit(tmp_path, event, lit=lit)
    other, *_ = fit(tmp_path, event)
    assert close(lit, other)
    assert lit.net.is_gradient_checkpointing


class Runs:
    """A backend for torch.compile that knows how often it has compiled, and how often what it has compiled has run."""

    def __init__(self):
        self.made = self.ran = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*arguments):
            self.ran += 1
            return graph.forward(*arguments)

        return run


COMPILED = {
    "in place": lambda lit, backend: lit.net.compile(backend=backend),
    "wrapped": lambda lit, backend: setattr(lit, "net", torch.compile(lit.net, backend=backend)),
}


@pytest.fixture
def unmeasured(monkeypatch):
    """Validation would be compiled, too."""
    torch._dynamo.reset()
    monkeypatch.setitem(FEW, "measure_batches", 0)
    yield
    torch._dynamo.reset()


@pytest.mark.daily("structure-in place")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("event", "form"), [*((event, "in place") for event in EVENTS), ("heads", "wrapped"), ("svd", "wrapped")]
)
def test_compiled_before_an_event_it_is_what_it_would_be_in_eager_mode(tmp_path, event, form):
    """Scores see true activations, gates act, and code that was made for other shapes is made anew."""
    backend, lit = Runs(), Own()
    COMPILED[form](lit, backend)
    lit, _, watch = fit(tmp_path, event, at=1, lit=lit, max_steps=2, limit_val_batches=0)
    other, _, beside = fit(tmp_path, event, at=1, max_steps=2, limit_val_batches=0)
    assert close(lit, other)
    assert watch.losses == pytest.approx(beside.losses, rel=1e-5)
    assert backend.ran == 2
    assert backend.made == (1 if event == "wanda" else 2)


@pytest.mark.nightly
@pytest.mark.usefixtures("unmeasured")
def test_many_events_leave_compiled_code_compiled(tmp_path):
    """Of so many shapes torch makes code, and no more after that."""
    backend, lit, ran = Runs(), Own(num_hidden_layers=1), []

    class Watched(pl.Callback):
        def on_train_batch_end(self, *_):
            ran.append(backend.ran)

    lit.net.compile(backend=backend)
    at = bh.schedules.Linear(final=1.0, start=0, end=4, every=1)
    callback = bh.StructuredPruning(bh.Amount(channels=0.75), at=at, importance=bh.importance.WeightNorm(), measure_batches=0)
    with torch._dynamo.config.patch(recompile_limit=2):
        trainer(tmp_path, [Watched(), callback], max_steps=5, limit_val_batches=0).fit(lit, loader(), loader(4, 4))
    assert ran == [1, 2, 3, 4, 5]


def test_a_layer_that_is_wrapped_is_refused_before_training(tmp_path):
    lit = Own()
    lit.net.model.layers[0] = torch.compile(lit.net.model.layers[0], backend="eager")
    before = weights(lit)
    with pytest.raises(ValueError, match=r"model.layers.0 is wrapped by torch.compile.*as in layer.compile\(\)"):
        trainer(tmp_path, [bh.Export(str(tmp_path / "out"))]).fit(lit, loader(), loader(4, 4))
    assert same(weights(lit), before)


class Late(Own):
    """Wraps its layers once its hooks are called, as for FSDP2."""

    def configure_model(self):
        for number, layer in enumerate(self.net.model.layers):
            self.net.model.layers[number] = checkpoint_wrapper(layer)


LEAVE = ["wanda", "masked", "depth"]
"""Events that cut no tensor."""


@pytest.mark.parametrize(("event", "late"), [*((event, False) for event in EVENTS if event not in LEAVE), ("mean", True)])
def test_layers_that_torch_recomputes_are_refused_before_training_where_they_would_be_cut(tmp_path, event, late):
    lit = Late() if late else Own()
    if not late:
        Late.configure_model(lit)
    before, run = weights(lit), trainer(tmp_path, [EVENTS[event]("start" if event == "svd" else 2)], max_steps=4)
    told = r"model.layers.0 is wrapped by torch's CheckpointWrapper.* gradient_checkpointing_enable"
    with pytest.raises(ValueError, match=told):
        run.fit(lit, loader(), loader(4, 4))
    assert run.global_step == 0
    assert same(weights(lit), before)


@pytest.mark.parametrize("event", LEAVE)
def test_layers_that_torch_recomputes_change_nothing_where_none_is_cut(tmp_path, event):
    lit, *_ = fit(tmp_path, event, lit=Late())
    other, *_ = fit(tmp_path, event)
    assert close(lit, other)


BARE = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"])
PLACES = {
    "barebones": {"barebones": True, **BARE},
    "sanity": {"num_sanity_val_steps": 2},
    "overfit": {"overfit_batches": 2},
    "three": {"fast_dev_run": 3},
    "unvalidated": {"limit_val_batches": 0},
    "anomalies": {"detect_anomaly": True, "deterministic": True, "inference_mode": False},
}


@pytest.mark.daily("wanda-*", "structure-overfit", "shrink-barebones")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("event", EVENTS)
def test_other_ways_to_run(tmp_path, event, place, monkeypatch):
    """With all that records and saves at the end."""
    monkeypatch.setattr(sys, "tracebacklimit", 1, raising=False)  # where anomalies are looked for, each op keeps the stack
    folder, picture = tmp_path / "out", tmp_path / "report.png"
    more = [bh.Export(str(folder)), bh.Report(str(picture))]
    lit, callback, _ = fit(tmp_path, event, more=more, **PLACES[place])
    assert folder.exists() == (place != "three")
    assert picture.exists() == (place != "unvalidated")
    assert ("val_loss" in callback.events[0]["after"]) == (place != "unvalidated")
    if folder.exists():
        ids = torch.arange(3, 15).view(2, 6)
        with torch.no_grad():
            assert torch.equal(bh.load(folder).eval()(ids).logits, lit.net.eval()(ids).logits)


@pytest.mark.daily("wanda-start", "structure-2")
@pytest.mark.parametrize("at", ["start", 2])
@pytest.mark.parametrize("event", EVENTS)
def test_looking_for_a_learning_rate_leaves_all_as_it_was(tmp_path, event, at):
    """With a Tuner and with a callback: the fit after it is what it would be without."""
    lit, callback = Own(), EVENTS[event](at)
    before, own = weights(lit), set(vars(lit))
    run = trainer(tmp_path, [callback], max_steps=4)
    Tuner(run).lr_find(lit, loader(), loader(4, 4), num_training=3, update_attr=False)
    assert same(weights(lit), before)
    assert not callback.events
    assert set(vars(lit)) <= own | {"_hparams"}
    run.fit(lit, loader(), loader(4, 4))
    assert [one["step"] for one in callback.events] == [0 if at == "start" else at]
    other, *_ = fit(tmp_path, event, at=at)
    third, *_ = fit(tmp_path, event, at=at, more=[LearningRateFinder(num_training_steps=3, update_attr=False)])
    assert same(weights(lit), weights(other))
    assert same(weights(third), weights(other))


AVERAGES = [EMAWeightAveraging, WeightAveraging, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]


@pytest.mark.daily("masked-start-EMA*", "mean-start-W*")
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("event", "at"), [("masked", 2), ("masked", "start"), ("mean", "start")])
def test_averaged_weights_are_pruned_or_converted_too(tmp_path, event, at, average):
    lit, *_ = fit(tmp_path, event, at=at, more=[average()], max_steps=-1, max_epochs=3)
    assert same_after_reload(lit, tmp_path)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("event", CONVERSIONS)
def test_averages_that_cannot_follow_are_refused(tmp_path, event, average):
    lit = Own()
    before = weights(lit)
    for at in (2, *(["start"] if event != "mean" else [])):
        with pytest.raises(ValueError, match="changes shapes during training, which .*Averaging does not support. Prune"):
            trainer(tmp_path, [EVENTS[event](at), average()], max_steps=-1, max_epochs=3).fit(lit, loader(), loader(4, 4))
    assert same(weights(lit), before)


class Rising(Own):
    """The first validation is the best one."""

    def on_validation_epoch_end(self):
        self.log("worse", float(self.global_step))


@pytest.mark.daily("wanda", "structure")
@pytest.mark.parametrize("event", EVENTS)
def test_the_best_checkpoint_is_from_before_the_event(tmp_path, event):
    """It is loaded into the model as it is after the event, which takes the shape that it had."""
    best = ModelCheckpoint(tmp_path, monitor="worse", save_top_k=1, filename="{step}", save_on_train_epoch_end=False)
    lit, straight = Rising(), Rising()
    run = trainer(tmp_path, [EVENTS[event](2), best], max_steps=4, val_check_interval=1)
    run.fit(lit, loader(), loader(4, 4))
    assert best.best_model_path.endswith("step=1.ckpt")
    assert figures(lit) == END[event]
    said = run.validate(lit, loader(4, 4), ckpt_path="best", verbose=False)
    assert figures(lit) == DENSE
    other = trainer(tmp_path, [], max_steps=1)
    other.fit(straight, loader(), loader(4, 4))
    assert same(weights(lit), weights(straight))
    assert said[0]["val_loss"] == other.validate(straight, loader(4, 4), verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("event", EVENTS)
def test_early_stopping_after_the_event(tmp_path, event):
    """What the event's own measuring logs is no validation to it."""
    stop = EarlyStopping("worse", patience=2, check_on_train_epoch_end=False)
    _, _, watch = fit(tmp_path, event, lit=Rising(), more=[stop], max_steps=9, val_check_interval=1)
    assert [step for step, _ in watch.seen] == [0, 1, 2]
