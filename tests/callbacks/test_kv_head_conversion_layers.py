"""Attention after attention, as a schedule says."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from billhook import Export, KVHeadConversion, RepairConfig, Report, summary
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_by_layer
from billhook.kv_heads.convert import equal_heads
from billhook.kv_heads.methods import SVD
from billhook.kv_heads.plan import plan_kv_heads
from billhook.kv_methods import Mean
from billhook.model.plan import apply
from billhook.schedules import Constant, Linear, MultiStep
from kit.families import tokens
from kit.fits import data, module, same, trainer, weights
from kit.kv_zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
QUICK = {"method": "mean", "calibration": 4, "measure_batches": 0}
FOUR = {"num_hidden_layers": 4, "intermediate_size": 16}
STEPS = MultiStep([0.25, 0.75, 1.0], [1, 3, 4])


def conversion(at=STEPS, **options):
    return KVHeadConversion(2, at, **QUICK | options)


def checkpoints(folder):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


class Heads(pl.Callback):
    """KV heads of all attentions, and what the config says, at each training step."""

    def __init__(self):
        self.seen, self.said = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen.append("".join(map(str, kv_heads_by_layer(pl_module).values())))
        self.said.append(getattr(pl_module.model.config, "num_key_value_heads", None))


@pytest.mark.daily("steps", "fractions")
@pytest.mark.parametrize(
    ("at", "seen"),
    [
        (STEPS, ["4444", "4442", "4442", "4222", "2222", "2222"]),
        (Linear(final=1.0, start=0, end=4, every=2), ["4444", "4444", "4422", "4422", "2222", "2222"]),
        (Linear(final=1.0, end=0.5), ["4444", "4442", "4422", "2222", "2222", "2222"]),
        (Constant(1.0), ["2222"] * 6),
    ],
    ids=["steps", "every", "fractions", "at once"],
)
def test_the_last_go_first_and_the_config_tells_when_all_have_gone(files, tmp_path, at, seen):
    watch, callback = Heads(), conversion(at)
    trainer(tmp_path, [callback, watch], max_steps=6).fit(module(**FOUR), data(files))
    assert watch.seen == seen
    assert watch.said == [2 if one == "2222" else 4 for one in seen]
    whats = [event["what"] for event in callback.events]
    counts = [before.count("4") - after.count("4") for before, after in zip(["4444", *seen], seen, strict=False)]
    assert whats == [f"4 -> 2 KV heads in {count} of 4 attention modules (mean)" for count in counts if count]


def test_each_event_sees_the_model_as_it_then_is(files, tmp_path):
    """By hand: of training that changes nothing, first the last attention is converted, then the one before, as that is given."""
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens(24).split(8)]

    class Still(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    lit, hand = module(), module().model
    at = MultiStep([0.5, 1.0], [1, 2])
    callback = conversion(at, method="svd", repair=RepairConfig(), calibration=batches)
    trainer(tmp_path, [Still(), callback], max_steps=3).fit(lit, data(files))
    for name in reversed(list(kv_heads_by_layer(hand))):
        given = equal_heads(Attentions(hand, {name: 2}), SVD(), [(one, None) for one in batches], RepairConfig())
        apply(hand, plan_kv_heads(hand, 2, layers=[name]), weights=given.values)
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(
            lit.model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert [event["what"] for event in callback.events] == [f"4 -> 2 KV heads in 1 of 2 attention modules ({given.how})"] * 2


def test_resumed_equals_straight_through(files, tmp_path):
    """Stopped right at, between and after the two events."""
    at = MultiStep([0.5, 1.0], [1, 3])
    straight = module()
    trainer(tmp_path, [conversion(at, method="svd"), checkpoints(tmp_path)], max_steps=4).fit(straight, data(files))
    for stop in (1, 2, 3):
        resumed, callback = module(seed=1), conversion(at, method="svd")
        trainer(tmp_path, [callback], max_steps=4).fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight)), stop
        assert [event["step"] for event in callback.events] == [1, 3]


def test_at_the_end_it_is_an_ordinary_checkpoint(files, tmp_path, capsys):
    lit, callback = module(), KVHeadConversion(2, MultiStep([0.5, 1.0], [1, 2]), method="svd", calibration=4)
    callbacks = [callback, Export(str(tmp_path / "out")), Report(str(tmp_path / "report.png"))]
    trainer(tmp_path, callbacks, max_steps=3).fit(lit, data(files))
    assert "from_pretrained loads it" in (out := capsys.readouterr().out)
    assert "after 4 -> 2 KV heads in 1 of 2 attention modules (svd)" in out
    again, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens()
    assert again.config.num_key_value_heads == 2
    with torch.no_grad():
        assert torch.equal(again(ids).logits, lit.model.eval()(ids).logits)
    # 2 tensors of 4 heads' width, of float32: a head less saves 2 * 4 * 4 bytes per token
    assert [event["after"]["kv_cache_bytes"] for event in callback.events] == [(8 - 2 * gone) * 32 for gone in (1, 2)]


def test_a_model_between_reloads(files, tmp_path):
    lit = module(**FOUR)
    trainer(tmp_path, [conversion(MultiStep([0.5, 1], [1, 4])), checkpoints(tmp_path)], max_steps=4).fit(lit, data(files))
    again = module(seed=1, **FOUR)
    run = trainer(tmp_path, [conversion()], max_steps=4)
    run.validate(again, data(files), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert list(kv_heads_by_layer(again).values()) == [4, 4, 2, 2]
    assert summary(again).numbers()["kv_cache_bytes"] == 12 * 32


class OfTwo(pl.LightningModule):
    """An encoder-decoder."""

    def __init__(self, family="bart"):
        super().__init__()
        torch.manual_seed(0)
        self.model = build(family).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.daily("t5-*")
@pytest.mark.parametrize(
    ("family", "names"), [("bart", ["self_attn", "encoder_attn"]), ("t5", ["SelfAttention", "EncDecAttention"])]
)
def test_of_an_encoder_decoder_cross_attention_goes_before_the_self_attention_of_its_block(family, names, tmp_path):
    lit, watch, callback = OfTwo(family), Heads(), conversion(MultiStep([0.25, 1.0], [1, 2]), method="aligned")
    trainer(tmp_path, [callback, watch], max_steps=3).fit(lit, DataLoader(tokens(12), batch_size=2))
    assert [name.rpartition(".")[2] for name in kv_heads_by_layer(lit)][2:] == names * 2
    assert watch.seen == ["888888", "888882", "882222"]


def test_the_encoder_too_on_request(tmp_path):
    lit, callback = OfTwo(), conversion(2, encoder=True, method="svd")
    trainer(tmp_path, [callback], max_steps=2).fit(lit, DataLoader(tokens(12), batch_size=2))
    assert set(kv_heads_by_layer(lit).values()) == {2}
    assert [event["what"] for event in callback.events] == ["8 -> 2 KV heads (svd)"]


class TestRefused:
    """Before anything has changed."""

    @pytest.mark.parametrize(
        ("heads", "at", "match"),
        [
            ([2, 1], STEPS, "must have the same length"),
            ([2, 1], [STEPS, 5], "at=\\[MultiStep.* must be one of start or"),
        ],
    )
    def test_arguments(self, heads, at, match):
        with pytest.raises(ValueError, match=match):
            KVHeadConversion(heads, at)

    def refused(self, files, folder, callbacks, match, lit=None, loader=None, **options):
        lit = lit or module()
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(folder, callbacks, **options).fit(lit, loader or data(files))
        assert same(weights(lit), before)

    @pytest.mark.parametrize(
        ("at", "match"),
        [
            (Linear(final=0.5, end=4), "is the share of the amount to prune and must reach 1 before training ends"),
            (MultiStep([0.5, 2.0], [1, 2]), "must increase from 0 to 1, but is 2 at step 2 after 0.5"),
            (MultiStep([0.5, 0.25, 1.0], [1, 2, 3]), "is 0.25 at step 2 after 0.5"),
            (MultiStep([0.5, 1.0], [1, 9]), "steps=9 is past the end of training"),
        ],
    )
    def test_schedules_that_do_not_lead_there(self, files, tmp_path, at, match):
        self.refused(files, tmp_path, [conversion(at)], match)

    def test_a_stage_of_another_between(self, files, tmp_path):
        callbacks = [conversion(MultiStep([0.5, 1.0], [2, 5])), KVHeadConversion(1, at=3)]
        self.refused(files, tmp_path, callbacks, "divide it, got 2 at step 2, 1 at step 3, 2 at step 5")

    def test_a_training_whose_length_is_not_known(self, files, tmp_path):
        lit = module()
        lit.decay = "constant"
        options = {"max_steps": -1, "max_epochs": -1}
        match = r"at=.*: a schedule requires a known training length\. Set Trainer\(max_steps=\.\.\.\)"
        self.refused(files, tmp_path, [conversion()], match, lit, **options)

    def test_heads_that_cannot_change_places(self, files, tmp_path):
        """A position bias knows heads by their number."""
        lit, loader = OfTwo("t5"), DataLoader(tokens(4), batch_size=2)
        self.refused(files, tmp_path, [conversion(2, method=Mean("similar"))], "grouping='similar' reorders heads", lit, loader)
