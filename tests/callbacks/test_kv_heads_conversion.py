import csv

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from billhook import KVHeadConversion, TransformerModule
from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.convert import convert_kv_heads
from billhook.training import ShapeInCheckpoint
from kit.events import Own, Watch, loader
from kit.families import llama, tokens
from kit.fits import data, module, same, trainer, weights

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")


class Heads(pl.Callback):
    """KV heads of the model at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(kv_heads_of(pl_module))


def checkpoints(folder, **options):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", **options)


@pytest.mark.daily("2-start-seen0", "1-0.5-seen2", "heads5-at5-seen5")
@pytest.mark.parametrize(
    ("heads", "at", "seen"),
    [
        (2, "start", [2] * 8),
        (2, 3, [4] * 3 + [2] * 5),
        (1, 0.5, [4] * 4 + [1] * 4),
        (1, 0, [1] * 8),
        ([2, 1], [2, 6], [4] * 2 + [2] * 4 + [1] * 2),
        ([2, 1], ["start", 0.25], [2] * 2 + [1] * 6),
        (2, 8, [4] * 8),
    ],
)
def test_it_happens_at_its_step(files, tmp_path, heads, at, seen):
    lit, watch = module(), Heads()
    trainer(tmp_path, [KVHeadConversion(heads, at), watch]).fit(lit, data(files))
    assert watch.seen == seen
    assert kv_heads_of(lit) == (heads[-1] if isinstance(heads, list) else heads)


def test_at_the_start_is_what_converting_before_the_fit_is(files, tmp_path):
    one, other = module(), module()
    trainer(tmp_path, [KVHeadConversion(2)]).fit(one, data(files))
    convert_kv_heads(other, 2)
    trainer(tmp_path, []).fit(other, data(files))
    assert same(weights(one), weights(other))


def test_in_the_middle_is_what_two_fits_by_hand_are(files, tmp_path):
    """Independent of the callback: the same steps written as a plain training loop."""
    lit, batches = module(), []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    trainer(tmp_path, [KVHeadConversion(1, at=3), Keep()], gradient_clip_val=1.0).fit(lit, data(files))
    by_hand = module()
    with torch.no_grad():
        decay, rest = ([p for p in by_hand.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, fused=True
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 8)
    for step, batch in enumerate(batches):
        if step == 3:
            convert_kv_heads(by_hand, 1, optimizers=[optimizer])
        optimizer.zero_grad()
        by_hand.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(lit.state_dict()[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights_only", [True, False])
def test_load_from_checkpoint(files, tmp_path, weights_only):
    lit = module()
    trainer(tmp_path, [KVHeadConversion(1, at=2), checkpoints(tmp_path, save_weights_only=weights_only)], max_steps=4).fit(
        lit, data(files)
    )
    loaded = TransformerModule.load_from_checkpoint(tmp_path / "step=4.ckpt", model=llama(vocab_size=2048))
    assert same(weights(loaded), weights(lit))


class Plain(pl.LightningModule):
    """A module of a user's own, which knows nothing of billhook."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = llama().train()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self.net(batch, labels=batch).loss, "val_rows": float(len(batch))})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Mixed(ShapeInCheckpoint, Plain):
    """The same with the mixin."""


@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_load_from_checkpoint_of_the_users_own_module(tmp_path, kind):
    lit, loader = kind(), DataLoader(tokens(8), batch_size=2)
    run = trainer(tmp_path, [KVHeadConversion(2, at=1)], max_steps=2)
    run.fit(lit, loader, {"a": loader, "b": loader} if kind is Mixed else loader)
    run.save_checkpoint(tmp_path / "last.ckpt")
    if kind is Mixed:
        assert same(weights(Mixed.load_from_checkpoint(tmp_path / "last.ckpt")), weights(lit))
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            Plain.load_from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_saved_after_the_fit_resumes_too(tmp_path):
    lit, loader = Plain(), DataLoader(tokens(16), batch_size=2)
    run = trainer(tmp_path, [KVHeadConversion(2, at=2)], max_steps=4)
    run.fit(lit, loader, loader)
    assert "on_save_checkpoint" not in lit.__dict__
    run.save_checkpoint(tmp_path / "late.ckpt")
    again = Plain()
    run = trainer(tmp_path, [KVHeadConversion(2, at=2)], max_steps=6)
    run.fit(again, loader, loader, ckpt_path=tmp_path / "late.ckpt")
    assert kv_heads_of(again) == 2


class Peculiar(Plain):
    """Validates in as many ways as people do."""

    def on_validation_start(self):
        self.losses = []

    def validation_step(self, *arguments):
        batch = arguments[0]["a"] if isinstance(arguments[0], dict) else arguments[0]
        loss = self.net(batch, labels=batch).loss
        self.losses.append(loss)
        self.log("val_loss", loss)
        self.log("val_sum", loss, reduce_fx="sum")
        self.log("val_max", loss, reduce_fx="max")

    def on_validation_epoch_end(self):
        self.log("val_end", torch.stack(self.losses).mean())


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")
@pytest.mark.parametrize("kind", ["one", "list", "together"])
def test_measured_is_what_validation_says_whatever_it_logs(tmp_path, kind):
    train, ragged, other = (DataLoader(tokens(rows), batch_size=4) for rows in (8, 9, 5))
    loaders = {"one": ragged, "list": [ragged, other], "together": CombinedLoader({"a": ragged, "b": other}, "max_size")}[kind]
    lit, callback = Peculiar(), KVHeadConversion(2, at=2)
    trainer(tmp_path, [callback], max_steps=2).fit(lit, train, loaders)
    said = {k: v for result in trainer(tmp_path, []).validate(lit, loaders, verbose=False) for k, v in result.items()}
    assert len(said) == (7 if kind == "list" else 4)
    for name, value in said.items():
        assert callback.events[0]["after"][name] == pytest.approx(value, rel=1e-5), name


def test_measuring_changes_nothing(files, tmp_path):
    plain, measured = module(), module()
    trainer(tmp_path, [KVHeadConversion(2, at=3, measure_batches=0)]).fit(plain, data(files))
    callback = KVHeadConversion(2, at=3)
    trainer(tmp_path, [callback]).fit(measured, data(files))
    assert same(weights(plain), weights(measured))
    assert callback.events[0]["after"]["val_perplexity"] > 1
    assert callback.events[0]["after"]["params"] == measured.model.num_parameters()


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_events_are_logged(files, tmp_path):
    callback, logger = KVHeadConversion([2, 1], ["start", 3]), pl.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, [callback], logger=logger).fit(module(), data(files))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("params")]
    assert [(int(row["step"]), float(row["params"])) for row in rows] == [
        (0, callback.events[0]["before"]["params"]),
        (0, callback.events[0]["after"]["params"]),
        (2, callback.events[1]["after"]["params"]),  # with the third training step
    ]
    assert float(rows[2]["val_perplexity_after"]) == callback.events[1]["after"]["val_perplexity"]
    assert float(rows[2]["val_perplexity_before"]) == callback.events[1]["before"]["val_perplexity"]


def test_fast_dev_run_tries_every_stage(files, tmp_path):
    lit = module()
    trainer(tmp_path, [KVHeadConversion([2, 1], [100, 200])], max_steps=-1, fast_dev_run=1).fit(lit, data(files))
    assert kv_heads_of(lit) == 1


class TestRefused:
    """With a message that says what is legal, before anything has changed."""

    def refused(self, files, folder, callbacks, match, lit=None, **options):
        lit = lit or module()
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(folder, callbacks, **options).fit(lit, data(files))
        assert same(weights(lit), before)

    @pytest.mark.parametrize(
        ("callbacks", "match"),
        [
            (lambda: [KVHeadConversion(2, at=9)], "at=9 is past the end of training, which has 8 optimizer steps"),
            (lambda: [KVHeadConversion([2, 1], [4, 0.5])], "two stages have the same step"),
            (lambda: [KVHeadConversion(2, at=4), KVHeadConversion(1, at=0.5)], "two KVHeadConversion stages have the same step"),
            (
                lambda: [KVHeadConversion(1, at=2), KVHeadConversion(2, at=4)],
                "than the one before and divide it, got 1 at step 2, 2 at step 4",
            ),
            (lambda: [KVHeadConversion(8, at=2)], "num_key_value_heads=8 must .* Use 1, 2"),
            (lambda: [KVHeadConversion(3, at=2)], "num_key_value_heads=3 must .* Use 1, 2"),
        ],
    )
    def test_before_training(self, files, tmp_path, callbacks, match):
        self.refused(files, tmp_path, callbacks(), match)

    def test_a_model_without_attention(self, files, tmp_path):
        config = transformers.MambaConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=1)
        self.refused(
            files,
            tmp_path,
            [KVHeadConversion(1, at=2)],
            "MambaForCausalLM does not support fewer KV heads: MambaForCausalLM has no attention",
            TransformerModule(config),
        )

    def test_a_fraction_of_endless_training(self, files, tmp_path):
        lit = TransformerModule(llama(vocab_size=2048), decay="constant", warmup=0)
        options = {"max_steps": -1, "max_epochs": -1}
        match = r"at=0\.5 is a fraction of an unknown training length\. Set Trainer\(max_steps=\.\.\.\), or use a step"
        self.refused(files, tmp_path, [KVHeadConversion(1, at=0.5)], match, lit, **options)
        by_hand, loader = Plain(), DataLoader(tokens(16), batch_size=2)
        by_hand.automatic_optimization = False
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, [KVHeadConversion(1, at=0.5)], max_steps=-1, max_epochs=2).fit(by_hand, loader, loader)

    def test_later_stages_beside_the_start_need_a_length_that_is_known(self, files, tmp_path):
        epochs = {"max_steps": -1, "max_epochs": 1}
        match = r"needs a known training length\. Set Trainer\(max_steps=\.\.\.\) alone, or use 0 instead of 'start'"
        self.refused(files, tmp_path, [KVHeadConversion([2, 1], ["start", 3])], match, **epochs)
        callbacks = [KVHeadConversion(2), KVHeadConversion(1, at=0.5)]
        self.refused(files, tmp_path, callbacks, match, **epochs)
        self.refused(files, tmp_path, [KVHeadConversion(1), KVHeadConversion(2, at=4)], "fewer KV heads than the one before")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"num_key_value_heads": 2, "at": 1.5}, "at=1.5 .* fraction of training and must be in 0..1"),
            ({"num_key_value_heads": 2, "at": -1}, "at=-1 is negative"),
            ({"num_key_value_heads": 2, "at": "end"}, "at='end' must be one of start or "),
            ({"num_key_value_heads": [2, 1], "at": 3}, "must have the same length"),
            ({"num_key_value_heads": [1, 2], "at": [1, 2]}, "must be smaller than the one before"),
            ({"num_key_value_heads": [], "at": []}, "at least 1"),
            ({"num_key_value_heads": [4, 3], "at": [1, 2]}, "and divide it"),
            ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
            ({"num_key_value_heads": "4"}, "num_key_value_heads='4' must be a whole number"),
            ({"num_key_value_heads": 2, "method": "median"}, "method='median' must be one of mean, first, random"),
            ({"num_key_value_heads": 2, "measure_batches": -1}, "measure_batches=-1"),
        ],
    )
    def test_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            KVHeadConversion(**arguments)

    def test_averaged_weights(self, files, tmp_path):
        callbacks = [pl.callbacks.StochasticWeightAveraging(1e-3), KVHeadConversion(2)]
        epochs = {"max_steps": -1, "max_epochs": 2}
        self.refused(files, tmp_path, callbacks, "must be listed before StochasticWeightAveraging", **epochs)

    def test_another_models_checkpoint(self, files, tmp_path):
        trainer(tmp_path, [KVHeadConversion(2), checkpoints(tmp_path)], max_steps=2).fit(module(num_hidden_layers=1), data(files))
        with pytest.raises(ValueError, match="the checkpoint contains a different model: it lacks model.layers.1"):
            trainer(tmp_path, [KVHeadConversion(2)]).fit(module(), data(files), ckpt_path=tmp_path / "step=2.ckpt")


def test_training_that_ends_before_a_stage_says_so(files, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    callback = KVHeadConversion([2, 1], at=[5, 6], measure_batches=0)
    with pytest.warns(UserWarning, match="training ended at step 3, before the event at step 6 .the last of 2 pending"):
        trainer(tmp_path, [callback, Stop()]).fit(module(), data(files))


class Early(Own):
    """Creates its optimizer in its constructor, where billhook finds it, or where it does not."""

    def __init__(self, hidden):
        super().__init__()
        made = torch.optim.SGD(self.parameters(), 0.1)
        self.made = (made,) if hidden else made

    def configure_optimizers(self):
        return self.made[0] if isinstance(self.made, tuple) else self.made


@pytest.mark.parametrize("hidden", [False, True])
def test_an_optimizer_from_before_the_start(tmp_path, hidden):
    """It trains the new projections, or is refused."""
    lit, conversion = Early(hidden), KVHeadConversion(2, at="start", method="mean")
    if hidden:
        with pytest.raises(ValueError, match="SGD was created before training and holds parameters that KVHeadConversion has"):
            trainer(tmp_path, [conversion], max_steps=2).fit(lit, loader(), loader(4, 4))
        return
    trainer(tmp_path, [conversion, Watch()], max_steps=2).fit(lit, loader(), loader(4, 4))
    assert lit.net.config.num_key_value_heads == 2
