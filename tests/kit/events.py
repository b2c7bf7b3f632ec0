"""One callback of every kind, and a fit of a small module of a user's own that says what came of it."""

import math

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

import billhook as bh
from billhook.model.find import find_transformer
from billhook.model.layers import prunable
from kit import prunes, shrinks
from kit.families import llama
from kit.fits import trainer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
FEW = {"calibration": 4, "measure_batches": 1}
EVENTS = {
    "wanda": lambda at: prunes.WeightPruning(sparsity=0.5, at=at, **FEW),
    "heads": lambda at: bh.HeadPruning(0.5, at=at, **FEW),
    "masked": lambda at: bh.HeadPruning(0.5, at=at, remove="never", **FEW),
    "structure": lambda at: bh.StructuredPruning(bh.Amount(channels=0.5, kv_heads=0.5), at=at, **FEW),
    "polished": lambda at: bh.StructuredPruning(bh.Amount(channels=0.5), at=at, polish=bh.PolishConfig(steps=3), **FEW),
    "shrink": lambda at: shrinks.Shrinking(params=0.83, round_to=12, generations=1, candidates=2, repair=None, at=at, **FEW),
    "depth": lambda at: bh.DepthPruning(1, at=at, **FEW),
    "mean": lambda at: bh.KVHeadConversion(2, at=at, measure_batches=FEW["measure_batches"]),
    "svd": lambda at: bh.KVHeadConversion(2, at=at, method="svd", **FEW),
}


class OneOf:
    """Equals each of several figures."""

    def __init__(self, *figures):
        self.figures = figures

    def __eq__(self, other):
        return other in self.figures

    def __getitem__(self, part):
        return OneOf(*(own[part] for own in self.figures))

    __hash__ = None


# blocks; rows of query, key and up projections; gated attentions; share of zeros
DENSE = (2, 16, 16, 24, 0, 0.0)
# of shrink, by what its event says: half of the channels go, a block, or three of four heads
WAYS = {"channels": (2, 16, 16, 12, 0, 0.0), "blocks": (1, 16, 16, 24, 0, 0.0), "heads": (2, 4, 4, 24, 0, 0.0)}
AFTER = {
    "wanda": (2, 16, 16, 24, 0, 0.5),
    "heads": (2, 8, 8, 24, 0, 0.0),
    "masked": (2, 16, 16, 24, 2, 0.0),
    "structure": (2, 8, 8, 12, 0, 0.0),
    "shrink": OneOf(*WAYS.values()),  # whichever loses least
    "polished": (2, 16, 16, 12, 0, 0.0),
    "depth": (1, 16, 16, 24, 0, 0.0),
    "mean": (2, 16, 8, 24, 0, 0.0),
    "svd": (2, 16, 8, 24, 0, 0.0),
}
END = AFTER | {"masked": (2, 16, 16, 24, 0, 0.0, 0.5)}  # of the output projections half is zero then


def figures(lit):
    """See above."""
    model = find_transformer(lit)
    layers = getattr(model, "model", model).layers
    own = [layers[0].self_attn.q_proj, layers[0].self_attn.k_proj, layers[-1].mlp.up_proj]
    gates = sum(len(layer.self_attn.o_proj._forward_pre_hooks) for layer in layers)
    zeros = {round(float((linear.weight == 0).float().mean()), 1) for linear in prunable(model).values()}
    return (len(layers), *(linear.weight.shape[0] for linear in own), gates, *sorted(zeros))


def loader(batch_size=2, number=8):
    torch.manual_seed(7)
    rows = torch.randint(3, 64, (number, 6))
    return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=batch_size)


class Own(pl.LightningModule):
    """A module of a user's own, which knows nothing of billhook."""

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr = llama(**SIZES | changes).train(), 1e-2

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def other():
    """A module with other weights than any other, which a checkpoint must replace."""
    lit = Own()
    with torch.no_grad():
        for parameter in lit.parameters():
            parameter.add_(1.0)
    return lit


class Watch(pl.Callback):
    """What the model is before each batch, by global step; each parameter moves, and optimizers hold those that there are."""

    still = False

    def __init__(self):
        self.seen, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.global_step, figures(pl_module)))
        held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(map(id, pl_module.parameters()))
        self.before = trainer.global_step, {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:
            self.losses.append(float(outputs["loss"]))
        step, before = self.before
        still = [name for name, p in pl_module.named_parameters() if torch.equal(p, before[name])]
        assert self.still or still == ([] if trainer.global_step > step else list(before))

    def check(self, event, at):
        """Nothing before the step, all of it from then on."""
        assert {step for step, seen in self.seen if seen == DENSE} == {step for step, _ in self.seen if step < at}
        assert {step for step, seen in self.seen if seen == AFTER[event]} == {step for step, _ in self.seen if step >= at}
        assert all(map(math.isfinite, self.losses))


def fit(folder, event, at=2, lit=None, more=(), train=None, max_steps=4, **options):
    """The module, the callback and the watch of a fit in which an event happens, which is checked."""
    lit, callback, watch = lit or Own(), EVENTS[event](at), Watch()
    run = trainer(folder, [watch, callback, *more], max_steps=max_steps, **options)
    run.fit(lit, train or loader(), loader(4, 4))
    watch.check(event, 0 if at == "start" else at)
    assert figures(lit) == END[event]
    assert [one["step"] for one in callback.events] == [0 if at == "start" else at]
    if event == "shrink":
        assert figures(lit) == WAYS[next(way for way in WAYS if way in callback.events[0]["what"])]
    return lit, callback, watch


def same_after_reload(lit, folder):
    """What is saved computes the same."""
    bh.save(lit, folder / "saved")
    again, own, ids = bh.load(folder / "saved").eval(), find_transformer(lit).eval(), torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        return torch.equal(again(ids).logits, own(ids).logits)


def close(left, right, atol=1e-5):
    """Whether two modules have the same weights but for rounding."""
    one, other = (find_transformer(lit).state_dict() for lit in (left, right))
    return all(torch.allclose(a, b, atol=atol, rtol=1e-4) for a, b in zip(one.values(), other.values(), strict=True))
