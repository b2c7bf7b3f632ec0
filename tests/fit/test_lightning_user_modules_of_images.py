"""A LightningModule of images, or speech, as people write one, which knows nothing of billhook: events, resume, what is saved."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPModel, ConvNextConfig, ConvNextForImageClassification, ViTForImageClassification
from transformers import WhisperForConditionalGeneration as Whisper

import billhook as bh
from billhook.model.layers import prunable
from kit import prunes
from kit.clip_and_whisper import clip, whisper
from kit.fits import same, trainer, weights
from kit.images import CLASSES, config

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
FEW = {"calibration": 4, "measure_batches": 1}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": len(CLASSES)}
MODELS = {
    "vit": lambda: ViTForImageClassification(config()),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES)),
    "clip": clip,
    "whisper": whisper,
}
EVENTS = {
    "wanda": lambda: prunes.WeightPruning(sparsity=0.5, at=2, **FEW),
    "heads": lambda: bh.HeadPruning(0.5, at=2, **FEW),
    "structure": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=2, repair=None, **FEW),
    "depth": lambda: bh.DepthPruning(1, at=2, **FEW),
    "mean": lambda: bh.KVHeadConversion(1, at=2, encoder=True, measure_batches=1),
}


def answers(net, given, words):
    """The logits of a batch, and what is right."""
    if isinstance(net, CLIPModel):
        return net(pixel_values=given, input_ids=words).logits_per_image, torch.arange(len(given))
    if isinstance(net, Whisper):
        return net(input_features=given, decoder_input_ids=words).logits[:, :-1].flatten(0, 1), words[:, 1:].flatten()
    return net(pixel_values=given).logits, words[:, 0]


class Own(pl.LightningModule):
    """Images, or sounds, and words without names, and a loss by hand."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(0)
        self.net = MODELS[model]()

    def training_step(self, batch):
        return cross_entropy(*answers(self.net, *batch))

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(model):
    torch.manual_seed(7)
    given = torch.randn(6, 8, 100) if model == "whisper" else torch.randn(6, 3, 16, 16)
    words = torch.stack([torch.arange(6), *torch.randint(1, 32, (4, 6)), torch.zeros(6, dtype=torch.long)], 1)
    return DataLoader(TensorDataset(given, words), batch_size=2)


@pytest.mark.daily("convnext-structure", "clip-heads", "whisper-wanda")
@pytest.mark.parametrize(
    ("model", "event"),
    [
        *(("vit", event) for event in EVENTS),
        *((model, event) for model in ("convnext", "clip", "whisper") for event in ("wanda", "structure")),
        *((model, "heads") for model in ("clip", "whisper")),
    ],
)
def test_events_resume_and_what_is_saved(tmp_path, model, event):
    lit, again, callback, other = Own(model), Own(model), EVENTS[event](), EVENTS[event]()
    rows = loader(model)
    before = sum(one.numel() for one in lit.parameters())
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, [callback, keep], max_steps=6).fit(lit, rows, rows)
    assert [one["step"] for one in callback.events] == [2]
    if event == "wanda":
        zeros = [float((own.weight == 0).float().mean()) for own in prunable(lit.net, convolutions="none").values()]
        assert zeros == [pytest.approx(0.5, abs=0.01)] * len(zeros)
    else:
        assert sum(one.numel() for one in lit.parameters()) < before
    trainer(tmp_path, [other], max_steps=6).fit(again, rows, rows, ckpt_path=tmp_path / "step=3.ckpt")
    assert same(weights(again), weights(lit))
    bh.save(lit, tmp_path / "saved")
    batch = next(iter(rows))
    with torch.no_grad():
        assert torch.equal(answers(bh.load(tmp_path / "saved").eval(), *batch)[0], answers(lit.net.eval(), *batch)[0])
