"""The methods that take more than the weights, within a fit."""

import logging
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, IterableDataset

import billhook as bh
from billhook import KVHeadConversion, RepairConfig
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_by_layer, kv_heads_of
from billhook.kv_heads.convert import convert_kv_heads, equal_heads
from billhook.kv_heads.methods import method_of
from billhook.kv_heads.plan import plan_kv_heads
from kit.families import llama, tokens
from kit.fits import data, module, same, trainer, weights
from kit.kv_zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
QUICK = {"method": "mean", "calibration": 8, "measure_batches": 0}
WAYS = {
    "aligned": {"method": "aligned"},
    "svd": {"method": "svd"},
    "auto": {"method": "auto"},
    "mean, similar": {"method": bh.kv_methods.Mean("similar")},
    "mean, renorm": {"method": bh.kv_methods.Mean(renorm=True)},
    "mean, repaired": {"repair": RepairConfig()},
    "svd, similar, repaired": {"method": bh.kv_methods.SVD("similar"), "repair": RepairConfig()},
}


def conversion(heads=2, at=2, **options):
    return KVHeadConversion(heads, at, **QUICK | options)


class Seen(Callback):
    """The weights at the beginning of each training step."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(weights(pl_module))


def batches(count=3):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 2000, (count, 2, 12), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


def test_with_data_the_best_method_is_taken_and_told(files, tmp_path):
    lit, callback = module(num_hidden_layers=1), KVHeadConversion(2, at=1, calibration=batches(), measure_batches=0)
    trainer(tmp_path, [callback], max_steps=2).fit(lit, data(files))
    what = callback.events[0]["what"]
    chosen = re.match(r"4 -> 2 KV heads \(auto: (.*?); distances on held-out batches: ", what).group(1)
    losses = {name: float(loss) for name, loss in re.findall(r"(?:: |, )([a-z][a-z, ]*?) ([\d.e-]+)(?=[,;)])", what)}
    assert losses.keys() == {str(candidate) for candidate in bh.kv_methods.Auto().candidates}
    assert chosen == min(losses, key=losses.get)
    assert [type(one.method).__name__ for one in (callback, KVHeadConversion(2))] == ["Auto", "Mean"]


@pytest.mark.daily("aligned-*", "svd-start", "auto-2", "svd, similar, repaired-2")
@pytest.mark.parametrize(("way", "at"), [*((way, 2) for way in WAYS), ("svd", "start"), ("aligned", 0)])
def test_it_is_what_is_done_by_hand(files, tmp_path, way, at):
    """Independent of the fit: the heads of a group are equal by then, so that the first of each is all that there is."""
    options = {"method": "mean", "repair": None} | WAYS[way]
    step = 0 if at == "start" else at
    lit, before = module(num_hidden_layers=1), module(num_hidden_layers=1)
    seen, callback = Seen(), conversion(at=at, calibration=batches(), **WAYS[way])
    trainer(tmp_path, [callback, seen], max_steps=3).fit(lit, data(files))
    if step:
        trainer(tmp_path, [], max_steps=2).fit(before, data(files))
    pairs = [(one, None) for one in batches()]
    names = dict.fromkeys(plan_kv_heads(before, 2).layers, 2)
    given = equal_heads(Attentions(before.model, names), method_of(options["method"]), pairs, options["repair"])
    expected = {name.removeprefix("model."): value for name, value in before.state_dict().items()} | given.values
    for name, value in expected.items():
        kv = "k_proj" in name or "v_proj" in name
        own = value.view(2, 2, 4, 32)[:, 0].reshape(8, 32) if kv else value
        then = seen.states[step][f"model.{name}"]
        torch.testing.assert_close(then, own, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert [(event["step"], event["what"]) for event in callback.events] == [(step, f"4 -> 2 KV heads ({given.how})")]
    assert kv_heads_of(lit) == lit.model.config.num_key_value_heads == 2
    assert all(value.isfinite().all() for value in weights(lit).values())


@pytest.mark.parametrize(
    ("way", "anew", "kept"),
    [
        ("svd", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"up_proj", "down_proj", "norm"}),
        ("mean, similar", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"up_proj", "down_proj", "norm"}),
        ("mean, repaired", {"o_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "up_proj", "norm"}),
        ("mean", set(), {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "norm"}),
    ],
)
def test_the_optimizer_starts_anew_where_the_basis_is_another(files, tmp_path, way, anew, kept):
    lit = module(num_hidden_layers=1)
    run = trainer(tmp_path, [conversion(at=3, **WAYS.get(way, {}))], max_steps=5)
    run.fit(lit, data(files))
    steps = {name: int(run.optimizers[0].state[parameter]["step"]) for name, parameter in lit.named_parameters()}
    for kinds, count in ((anew, 2), (kept, 5)):
        for kind in kinds:
            assert {steps[name] for name in steps if f"{kind}." in name or (kind in name and kind == "norm")} == {count}, kind


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_low_precision_heads_are_still_turned(files, tmp_path, precision):
    """What may be turned is tried out on the model's own code, which must not be mistaken for other code when it rounds."""
    seen = {}
    for kind in (32, precision):
        watch = Seen()
        callbacks = [conversion(1, 0, method="svd", calibration=batches()), watch]
        trainer(tmp_path, callbacks, max_steps=1, precision=kind).fit(module(num_hidden_layers=1), data(files))
        seen[kind] = watch.states[0]["model.model.layers.0.self_attn.k_proj.weight"].float()
    plain = module(num_hidden_layers=1)
    convert_kv_heads(plain, 1)
    mean = plain.model.model.layers[0].self_attn.k_proj.weight
    error = (seen[precision] - seen[32]).norm() / seen[32].norm()
    assert error < 0.2 < (mean - seen[32]).norm() / seen[32].norm()


ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(3, 51).view(4, 12)]


class Stream(IterableDataset):
    """Rows that can be read only once."""

    def __init__(self):
        self.rows = iter(ROWS * 2)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


def test_aligned_does_without_data_that_can_be_read_only_once(tmp_path):
    lit = bh.TransformerModule(llama(), warmup=0)
    loader = DataLoader(Stream(), batch_size=2)
    trainer(tmp_path, [conversion(at=1, method="aligned")], max_steps=4).fit(lit, loader, DataLoader(ROWS))
    assert kv_heads_of(lit) == 2


class TestHint:
    """Of what the paper's method leaves on the table."""

    @pytest.fixture
    def hints(self, caplog):
        def told(files, folder, callbacks):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                trainer(folder, callbacks, max_steps=1).fit(module(), data(files))
            return [record.message for record in caplog.records if "'svd'" in record.message]

        return told

    def test_once_in_a_fit(self, files, tmp_path, hints):
        told = hints(files, tmp_path, [KVHeadConversion(2, measure_batches=0), KVHeadConversion(1, at=1, measure_batches=0)])
        assert len(told) == 1
        assert "14,841 with 'mean', 74 with 'svd'" in told[0]


class TestRefused:
    """With a message that says what is legal, before anything has changed."""

    def refused(self, files, folder, callback, match, lit=None, loader=None, **options):
        lit = lit or module()
        before = weights(lit)
        given = (data(files),) if loader is None else (loader, DataLoader(ROWS))
        with pytest.raises(ValueError, match=match):
            trainer(folder, [callback], **options).fit(lit, *given)
        assert same(weights(lit), before)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"method": "median"}, "method='median' must be one of mean, first, random, aligned, svd, auto"),
            ({"method": "random", "repair": RepairConfig()}, "repair goes with method 'mean', .* not with 'random'"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            KVHeadConversion(2, **options)

    def test_training_data_that_can_be_read_only_once(self, files, tmp_path):
        for way in ("svd", "auto", "mean, repaired"):
            lit, loader = bh.TransformerModule(llama(), warmup=0), DataLoader(Stream(), batch_size=2)
            callback = conversion(at=1, **WAYS[way])
            self.refused(files, tmp_path, callback, "Stream can be read only once. Pass batches", lit, loader)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"method": "auto", "calibration": 2},
                "calibration: method='auto' needs at least 2 batches, because some are held out, got 1",
            ),
            (
                {"repair": RepairConfig(), "calibration": batches(1)},
                "calibration: repair needs at least 2 batches, because some are held out, got 1",
            ),
            ({"method": "svd", "calibration": []}, "calibration: method='svd' needs at least 1 batch, got 0"),
        ],
    )
    def test_too_few_batches(self, files, tmp_path, options, match):
        self.refused(files, tmp_path, conversion(at=2, **options), match)

    def test_adapters(self, files, tmp_path):
        lit = bh.TransformerModule(llama(vocab_size=2048), lora=bh.training.LoRA(r=2))
        self.refused(
            files,
            tmp_path,
            conversion(**WAYS["svd"]),
            "heads stay in their bases.*: or convert the model first and attach adapters then",
            lit,
        )

    def test_quantised_weights(self, files, tmp_path):
        lit = module()
        linear = lit.model.model.layers[0].self_attn.k_proj
        linear.weight = torch.nn.Parameter(torch.ones(16, 32, dtype=torch.int8), requires_grad=False)
        self.refused(files, tmp_path, conversion(**WAYS["svd"]), "k_proj.weight is quantized .* before it is quantized", lit)


class OfTwo(LightningModule):
    """An encoder-decoder."""

    def __init__(self, family="bart"):
        super().__init__()
        torch.manual_seed(0)
        self.model = build(family).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_encoder_too_on_request(tmp_path):
    lit, callback = OfTwo(), KVHeadConversion(2, 2, "svd", encoder=True, calibration=4, measure_batches=0)
    trainer(tmp_path, [callback], max_steps=2).fit(lit, DataLoader(tokens(12), batch_size=2))
    assert set(kv_heads_by_layer(lit).values()) == {2}
    assert [event["what"] for event in callback.events] == ["8 -> 2 KV heads (svd)"]


def test_the_encoder_is_in_scope_on_request():
    model = build("bart")
    assert [name.split(".")[1] for name in kv_heads_by_layer(model, encoder=False)] == ["decoder"] * 4
    assert [name.split(".")[1] for name in kv_heads_by_layer(model)] == ["encoder"] * 2 + ["decoder"] * 4
