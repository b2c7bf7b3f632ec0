"""`TransformerModule` of CLIP and of Whisper, on a loader of one's own: loss, metric, prediction, a cut on the way."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPModel, WhisperForConditionalGeneration

import billhook as bh
from billhook.model.layers import prunable
from kit.clip_and_whisper import START, clip, clip_batch, whisper, whisper_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]


def fit(lit, batches, folder):
    """A fit that prunes at its second step, on batches that are ready; the first of them validates."""
    pruning = bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=2, calibration=12)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=4, callbacks=[pruning, bh.Export(str(folder))], log_every_n_steps=1, **options)
    trainer.fit(lit, DataLoader(batches, batch_size=None), first := DataLoader(batches[:1], batch_size=None))
    assert all(float((linear.weight == 0).float().mean()) == 0.5 for linear in prunable(lit.model).values())
    (predicted,) = trainer.predict(lit, first)
    return trainer.validate(lit, first, verbose=False)[0], predicted


def test_clip_compares_images_with_captions(tmp_path):
    batches = [clip_batch(seed) for seed in range(4)]
    metrics, predicted = fit(bh.TransformerModule(clip(), "feature-extraction", lr=1e-3), batches, tmp_path / "out")
    loaded = CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = loaded(**batches[0])
        similar = output.image_embeds @ output.text_embeds.T * loaded.logit_scale.exp()
    own = torch.arange(6)
    loss = (cross_entropy(similar, own) + cross_entropy(similar.T, own)) / 2
    assert metrics["val_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert metrics["val_accuracy"] == pytest.approx(float((similar.argmax(1) == own).float().mean()))
    assert torch.allclose(predicted, similar, rtol=1e-4)


def test_whisper_writes_what_it_hears(tmp_path):
    batches = [whisper_batch(seed) for seed in range(4)]
    metrics, predicted = fit(bh.TransformerModule(whisper(), "speech-seq2seq", lr=1e-3), batches, tmp_path / "out")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        loss = loaded(**batches[0]).loss
    assert metrics["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert torch.equal(predicted, loaded.generate(batches[0]["input_features"], max_length=16))
    assert START not in predicted


def test_clip_has_no_logits_to_learn_from_a_teacher():
    with pytest.raises(ValueError, match="distillation does not support task='feature-extraction'"):
        bh.TransformerModule(clip(), "feature-extraction", distillation=bh.training.Distillation())
