"""LightningModules as people write them, which know nothing of billhook."""

from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import billhook as bh
from kit import prunes, shrinks
from kit.events import END, EVENTS, SIZES, Own, figures, loader, same_after_reload
from kit.families import llama
from kit.fits import same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]


def config(**changes):
    return llama(**SIZES | changes).config


class Tuples(pl.LightningModule):
    """Rows without names, a model of any attribute, and a loss by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = AutoModelForCausalLM.from_config(config())

    def forward(self, ids, mask):
        return self.net(input_ids=ids, attention_mask=mask).logits

    def training_step(self, batch):
        ids, mask = batch
        logits = self(ids, mask)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch)["loss"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def tuples(batch_size=2, number=8):
    torch.manual_seed(7)
    ids = torch.randint(3, 64, (number, 6))
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    return DataLoader(TensorDataset(ids, mask), batch_size=batch_size)


class Groups(pl.LightningModule):
    """Made as late as can be, with groups of parameters, and a schedule that steps with the optimizer."""

    def __init__(self, where="configure_model"):
        super().__init__()
        self.save_hyperparameters()
        self.model = None

    def setup(self, stage):
        if self.hparams.where == "setup":
            self.make()

    def configure_model(self):
        if self.hparams.where == "configure_model":
            self.make()

    def make(self):
        if self.model is None:
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(config())

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        plain = ["bias", "norm"]
        named = list(self.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(part in n for part in plain)], "weight_decay": 0.1},
            {"params": [p for n, p in named if any(part in n for part in plain)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, self.trainer.estimated_stepping_batches + 2)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Encoder(nn.Module):
    """A backbone inside another module."""

    def __init__(self):
        super().__init__()
        self.backbone = AutoModelForCausalLM.from_config(config())
        self.dropout = nn.Dropout(0.0)

    def forward(self, ids):
        return self.dropout(self.backbone(input_ids=ids)[0].mean(1))


class Toggled(pl.LightningModule):
    """A head of its own, and two optimizers by hand, each for its part; calibrated on what its backbone takes."""

    def __init__(self, lr=1e-2, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.encoder = Encoder()
        self.head = nn.Linear(self.encoder.backbone.config.vocab_size, classes)

    def forward(self, ids):
        return self.head(self.encoder(ids))

    def calibration_batches(self):
        yield from loader(number=4)

    def training_step(self, batch, batch_idx):
        losses = []
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = cross_entropy(self(batch["input_ids"]), batch["input_ids"][:, 0] % 3)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            losses.append(loss.detach())
        self.log("loss", sum(losses))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch["input_ids"]), batch["input_ids"][:, 0] % 3))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.encoder.parameters(), self.hparams.lr), torch.optim.SGD(self.head.parameters(), 0.1)


KINDS = {"tuples": Tuples, "configure_model": Groups, "setup": lambda: Groups("setup"), "by hand": Toggled}


def loaders(kind):
    own = tuples if kind == "tuples" else loader
    return own(number=4), own(4, 4)


class Live(pl.Callback):
    """Optimizers hold what there is, in their groups, and all of it moves."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        assert sorted(id(p) for group in groups for p in group) == sorted(map(id, pl_module.parameters()))
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert not [name for name, p in pl_module.named_parameters() if torch.equal(p, self.before[name])]


@pytest.mark.daily("*-wanda", "setup-structure", "by hand-shrink", "tuples-heads", "configure_model-svd")
@pytest.mark.parametrize(("kind", "event"), list(product(KINDS, EVENTS)))
def test_events_in_modules_of_any_kind(tmp_path, kind, event):
    """Also resumed from a checkpoint that was saved at the end of the first epoch."""
    lit, again, callback, other = KINDS[kind](), KINDS[kind](), EVENTS[event](2), EVENTS[event](2)
    own, names = set(vars(lit)), f"{kind}-{{step}}"
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename=names)
    run = trainer(tmp_path, [Live(), callback, keep], max_steps=8 if kind == "by hand" else 4)
    run.fit(lit, *loaders(kind))
    assert [one["step"] for one in callback.events] == [2]
    assert figures(lit) == END[event]
    assert set(vars(lit)) - own <= {"_hparams"}
    first = tmp_path / f"{kind}-step={4 if kind == 'by hand' else 2}.ckpt"
    trainer(tmp_path, [other], max_steps=run.max_steps).fit(again, *loaders(kind), ckpt_path=first)
    assert same(weights(again), weights(lit))
    assert repr(other.events) == repr(callback.events)


@pytest.mark.daily("setup-wanda", "configure_model-structure", "setup-svd")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", ["configure_model", "setup"])
def test_a_model_that_is_made_late_is_as_one_that_is_made_early(tmp_path, kind, event):
    late, early = KINDS[kind](), KINDS[kind]()
    early.make()
    for lit in (late, early):
        callback = EVENTS[event]("start")
        trainer(tmp_path, [callback], max_steps=2).fit(lit, *loaders(kind))
        assert [one["step"] for one in callback.events] == [0]
        assert "configure_model" not in vars(lit)
    assert same(weights(late), weights(early))
    assert same_after_reload(late, tmp_path)


class Fails(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        raise OSError("no room")


def test_a_fit_that_fails_before_the_model_is_made_leaves_nothing_behind(tmp_path):
    lit = Groups()
    own = set(vars(lit))
    with pytest.raises(OSError, match="no room"):
        trainer(tmp_path, [EVENTS["mean"]("start"), Fails()]).fit(lit, *loaders("setup"))
    assert set(vars(lit)) - own <= {"_hparams"}


@pytest.mark.parametrize("dtype", ["32-true", "bf16-true"])
def test_a_model_made_late_with_weights_in_the_precision_of_the_trainer(tmp_path, dtype):
    """Lightning makes it in another default dtype, in which nothing else must be computed."""
    lit = Groups()
    trainer(tmp_path, [EVENTS["mean"]("start")], max_steps=2, precision=dtype).fit(lit, *loaders("setup"))
    assert {p.dtype for p in lit.parameters()} == {torch.bfloat16 if dtype == "bf16-true" else torch.float32}
    assert figures(lit) == END["mean"]


class ByHand(Own):
    """Rows without names for a step that steps its optimizer itself, and batches for the model, with labels."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch[0], attention_mask=batch[1], labels=batch[0]).loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0], labels=batch[0]).loss)


class Hooked(ByHand):
    def calibration_batches(self):
        return list(loader())


class Stop(pl.Callback):
    """Before the first step, after what happens at the start."""

    def on_train_start(self, trainer, pl_module):
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.max_steps = 0


NOW = {"at": "start", "measure_batches": 0}
CALIBRATED = {
    "wanda": lambda calibration=None: prunes.WeightPruning(bh.Wanda(), 0.5, calibration=calibration, **NOW),
    "taylor": lambda calibration=None: bh.HeadPruning(0.5, importance=bh.Taylor(), calibration=calibration, **NOW),
    "structure": lambda calibration=None: bh.StructuredPruning(bh.Amount(channels=0.5), calibration=calibration, **NOW),
    "shrink": lambda calibration=None: shrinks.Shrinking(params=0.9, generations=0, calibration=calibration, **NOW),
    "depth": lambda calibration=None: bh.DepthPruning(1, calibration=calibration, **NOW),
    "svd": lambda calibration=None: bh.KVHeadConversion(2, method="svd", calibration=calibration, **NOW),
}


def pruned_at_the_start(folder, lit, callback, data):
    trainer(folder, [callback, Stop()], max_steps=2).fit(lit, data, data)
    assert len(callback.events) == 1
    return weights(lit)


@pytest.mark.daily("wanda", "taylor")
@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_module_with_manual_optimization_says_what_it_is_calibrated_on(tmp_path, kind):
    """In `calibration_batches` or as `calibration=`: as with automatic optimization on the same batches."""
    batches, build = list(loader()), CALIBRATED[kind]
    expected = pruned_at_the_start(tmp_path, Own(), build(batches), loader())
    assert same(pruned_at_the_start(tmp_path, Hooked(), build(), tuples()), expected)
    assert same(pruned_at_the_start(tmp_path, ByHand(), build(batches), tuples()), expected)


@pytest.mark.parametrize("kind", ["wanda", "taylor"])
def test_manual_optimization_without_batches_for_the_model_is_refused_before_training(tmp_path, kind):
    lit = ByHand()
    before, run = weights(lit), trainer(tmp_path, [CALIBRATED[kind]()], max_steps=2)
    with pytest.raises(
        ValueError, match=r"ByHand, which uses manual optimization.*as calibration=, or .*calibration_batches\(self\)"
    ):
        run.fit(lit, tuples(), tuples())
    assert run.global_step == 0
    assert same(weights(lit), before)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (None, "calibration_batches of Returns returned None. Return batches"),
        (list(tuples()), "Returns uses manual optimization.* got list"),
    ],
)
def test_what_the_model_does_not_take_is_refused(tmp_path, batches, match):
    class Returns(ByHand):
        def calibration_batches(self):
            return batches

    lit = Returns()
    before = weights(lit)
    with pytest.raises(ValueError, match=f"calibration: {match}"):
        trainer(tmp_path, [CALIBRATED["wanda"]()], max_steps=2).fit(lit, tuples(), tuples())
    assert same(weights(lit), before)


class Listed(Own):
    """The model in a list, where torch does not see it."""

    def __init__(self):
        super().__init__()
        self.models, self.dummy = [self.net], nn.Linear(2, 2)
        del self.net

    @property
    def net(self):
        return self.models[0]


class Two(Own):
    def __init__(self):
        super().__init__()
        self.other = llama(**SIZES)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Listed, r"Listed contains no Hugging Face model .* that torch sees: 'models' has one in a list. Make it an attribute"),
        (Two, r"Two contains more than one Hugging Face model \(net, other\). Assign the model to use to the attribute `model`"),
    ],
)
def test_what_cannot_be_found_is_refused(tmp_path, kind, match):
    lit = kind()
    before = weights(lit)
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, [EVENTS["wanda"](2)]).fit(lit, *loaders("setup"))
    assert same(weights(lit), before)
    assert "configure_model" not in vars(lit)
