"""A LightningModule of images as people write one, which knows nothing of billhook: events, resume and what is saved."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTForImageClassification

import billhook as bh
from kit.fits import same, trainer, weights
from kit.images import CLASSES, config

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
FEW = {"calibration": 4, "measure_batches": 1}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": len(CLASSES)}
MODELS = {
    "vit": lambda: ViTForImageClassification(config()),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES)),
}
EVENTS = {
    "wanda": lambda: bh.WeightPruning(sparsity=0.5, at=2, **FEW),
    "heads": lambda: bh.HeadPruning(0.5, at=2, **FEW),
    "structure": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, repair=None, **FEW),
    "depth": lambda: bh.DepthPruning(1, at=2, **FEW),
    "mean": lambda: bh.KVHeadConversion(1, at=2, encoder=True, measure_batches=1),
}


class Classifier(pl.LightningModule):
    """Images and labels without names, and a loss by hand."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(0)
        self.net = MODELS[model]()

    def training_step(self, batch):
        pixels, labels = batch
        return cross_entropy(self.net(pixel_values=pixels).logits, labels)

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader():
    torch.manual_seed(7)
    return DataLoader(TensorDataset(torch.randn(6, 3, 16, 16), torch.arange(6)), batch_size=2)


@pytest.mark.parametrize(
    ("model", "event"), [*(("vit", event) for event in EVENTS), ("convnext", "wanda"), ("convnext", "structure")]
)
def test_events_resume_and_what_is_saved(tmp_path, model, event):
    lit, again, callback, other = Classifier(model), Classifier(model), EVENTS[event](), EVENTS[event]()
    before = sum(one.numel() for one in lit.parameters())
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, [callback, keep], max_steps=6).fit(lit, loader(), loader())
    assert [one["step"] for one in callback.events] == [2]
    if event == "wanda":
        zeros = [float((own.weight == 0).float().mean()) for own in lit.net.modules() if isinstance(own, torch.nn.Linear)]
        assert zeros == [pytest.approx(0.5, abs=0.01)] * len(zeros)
    else:
        assert sum(one.numel() for one in lit.parameters()) < before
    trainer(tmp_path, [other], max_steps=6).fit(again, loader(), loader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert same(weights(again), weights(lit))
    bh.save(lit, tmp_path / "saved")
    pixels = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "saved").eval()(pixels).logits, lit.net.eval()(pixels).logits)
