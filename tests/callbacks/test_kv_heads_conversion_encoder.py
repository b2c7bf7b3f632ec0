"""KV heads of an encoder-decoder in a fit."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from billhook import KVHeadConversion
from billhook.kv_heads.config import kv_heads_by_layer
from kit.families import tokens
from kit.fits import trainer
from kit.kv_zoo import build


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


def test_the_encoder_too_on_request(tmp_path):
    lit, callback = OfTwo(), KVHeadConversion(2, 2, "svd", encoder=True, calibration=4, measure_batches=0)
    trainer(tmp_path, [callback], max_steps=2).fit(lit, DataLoader(tokens(12), batch_size=2))
    assert set(kv_heads_by_layer(lit).values()) == {2}
    assert [event["what"] for event in callback.events] == ["8 -> 2 KV heads (svd)"]


def test_the_encoder_is_in_scope_on_request():
    model = build("bart")
    assert [name.split(".")[1] for name in kv_heads_by_layer(model, encoder=False)] == ["decoder"] * 4
    assert [name.split(".")[1] for name in kv_heads_by_layer(model)] == ["encoder"] * 2 + ["decoder"] * 4
