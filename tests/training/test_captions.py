"""Images with captions: folders and tables to batches, a fit of a tiny CLIP that prunes it, and every operation on one."""

import json

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

import billhook as bh
from billhook.assets import model_path
from billhook.model.linears import prunable
from billhook.training.captions import CaptionDataModule
from billhook.units.blocks import skipping
from billhook.units.find import find_units
from kit.families import llama
from kit.images import CLASSES, picture, write_processor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "projection_dim": 8}


def config():
    """With the vocabulary of the embedded tokenizer, whose end of text ends a caption."""
    text = SIZES | {"vocab_size": 2048, "max_position_embeddings": 12, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    return CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 16, "patch_size": 8}, projection_dim=8)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    AutoTokenizer.from_pretrained(model_path("tiny")).save_pretrained(folder)
    return write_processor(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images to train on, and six to validate on, with captions in a table beside them."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 12), ("validation", 6)):
        (folder / split).mkdir()
        lines = []
        for number in range(count):
            picture(number % 6).save(folder / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"A small {CLASSES[number % 6]}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    model = CLIPModel(config()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def module(photos, processor, model=None, **options):
    data = CaptionDataModule(photos, processor, **{"batch_size": 6} | options)
    data.read(model)
    return data


def test_a_folder_of_images_with_captions(photos, processor, clip):
    data = module(photos, processor, clip)
    (batch,) = data.val_dataloader()[0]
    pixels = AutoImageProcessor.from_pretrained(processor)([picture(number) for number in range(6)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], pixels["pixel_values"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 12), "as many as the model reads"
    assert data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == [f"A small {one}" for one in CLASSES]
    assert batch["return_loss"] is True
    short = module(photos, processor, max_length=3).val_dataloader()[0]
    assert next(iter(short))["input_ids"].shape == (6, 3)


def test_a_fit_learns_prunes_saves_and_is_loaded(photos, processor, tmp_path):
    torch.manual_seed(0)
    lit = bh.TransformerModule(config(), "feature-extraction", lr=1e-2, decay="constant")
    pruning = bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=10, calibration=12)
    export = bh.Export(str(tmp_path / "out"))
    options = QUIET | {"enable_model_summary": False, "check_val_every_n_epoch": 10}
    trainer = pl.Trainer(max_steps=20, callbacks=[pruning, export], **options)
    data = CaptionDataModule(photos, processor, batch_size=6)
    trainer.fit(lit, datamodule=data)
    assert all(float((one.weight == 0).float().mean()) == 0.5 for one in prunable(lit.model).values())
    (batch,) = data.val_dataloader()[0]
    loaded = CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = loaded(**batch)
        images, words = found.image_embeds, found.text_embeds
        similar = images @ words.T * loaded.logit_scale.exp()
    told, own = trainer.callback_metrics, torch.arange(6)
    loss = (cross_entropy(similar, own) + cross_entropy(similar.T, own)) / 2
    assert float(told["val_loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(told["val_accuracy"]) == pytest.approx(float((similar.argmax(1) == own).float().mean()))
    assert told["val_accuracy"] > 1 / 6, "more than by chance"
    (predicted,) = trainer.predict(lit, datamodule=data)
    assert torch.allclose(predicted, similar, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ant")["input_ids"] == data.tokenizer("ant")["input_ids"]
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == data.image_processor.size


def test_blocks_of_both_towers_go_as_if_they_were_skipped(photos, processor, clip, tmp_path):
    (batch,) = module(photos, processor, clip).val_dataloader()[0]
    gone = {"text_model.encoder.layers": [0], "vision_model.encoder.layers": [1]}
    with torch.no_grad(), skipping(clip, gone):
        expected = clip(**batch).logits_per_image
    bh.prune_units(clip, gone, kind="block")
    bh.save(clip, tmp_path / "out")
    loaded = CLIPModel.from_pretrained(tmp_path / "out").eval()
    assert (loaded.config.text_config.num_hidden_layers, loaded.config.vision_config.num_hidden_layers) == (1, 1)
    with torch.no_grad():
        assert torch.allclose(clip(**batch).logits_per_image, expected, rtol=1e-5)
        assert torch.equal(loaded(**batch).logits_per_image, clip(**batch).logits_per_image)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_units_go_as_if_they_were_masked(photos, processor, clip, tmp_path, kind):
    """In the tower of images and in that of text."""
    (batch,) = module(photos, processor, clip).val_dataloader()[0]
    units = find_units(clip, kind)
    assert {place.partition(".")[0] for place in units} == {"text_model", "vision_model"}
    gone = {place: [number % 2, 2] for number, place in enumerate(units)}
    with torch.no_grad(), bh.mask(clip, gone, kind):
        expected = clip(**batch).logits_per_image
    with torch.no_grad():
        whole = clip(**batch).logits_per_image
        bh.prune_units(clip, gone, kind=kind)
        found = clip(**batch).logits_per_image
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-2)
    compares_on(clip, batch, tmp_path)


def test_widths_that_the_output_shows_stay(clip):
    """CLIP returns the hidden states of both towers beside what it compares."""
    units = find_units(clip, "residual")
    with pytest.raises(ValueError, match="cannot be removed: the model's output has it"):
        bh.prune_units(clip, {place: [0] for place in units}, kind="residual")


def compares_on(model, batch, folder):
    bh.save(model, folder / "out")
    with torch.no_grad():
        assert torch.equal(bh.load(folder / "out").eval()(**batch).logits_per_image, model.eval()(**batch).logits_per_image)


def test_kv_heads_are_merged_in_both_towers(photos, processor, clip, tmp_path):
    (batch,) = module(photos, processor, clip).val_dataloader()[0]
    bh.convert_kv_heads(clip, 2, "svd", [batch])
    towers = clip.text_model, clip.vision_model
    assert all(tower.encoder.layers[1].self_attn.k_proj.weight.shape == (8, 16) for tower in towers)
    compares_on(clip, batch, tmp_path)


def test_scores_repair_and_weights(photos, processor, clip, tmp_path):
    batches = list(module(photos, processor, clip)._loader("train"))
    plan = bh.plan(clip, bh.Taylor(), batches, heads=0.5, channels=0.25)
    bh.apply(clip, plan, weights=bh.repair(clip, plan, batches))
    bh.prune(clip, bh.Wanda(), batches, sparsity=0.5)
    assert {float((one.weight == 0).float().mean()) for one in prunable(clip).values()} == {0.5}
    compares_on(clip, batches[0], tmp_path)


def test_what_is_refused(photos, processor):
    with pytest.raises(ValueError, match="a LlamaForCausalLM does not compare images with captions"):
        module(photos, processor, llama())
    with pytest.raises(ValueError, match="batch_size=1 must be a whole number of at least 2"):
        module(photos, processor, batch_size=1)
    with pytest.raises(ValueError, match="the split 'train' has no column 'caption'; it has image, text"):
        module(photos, processor, text_column="caption")
    rows = {"image": [picture(0)] * 2, "text": ["an ant", None]}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="the column 'text' must hold text in every row"):
        list(module(rows, processor, batch_size=2, validation=0)._loader("train"))
    with pytest.raises(ValueError, match="distillation: a teacher of logits has none to give for task='feature-extraction'"):
        bh.TransformerModule(config(), "feature-extraction", distillation=bh.Distillation())
