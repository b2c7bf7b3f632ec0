"""Augmentation: of training images alone, decided by the seed, the epoch and the image, and the same in a resumed run."""

import sys

import datasets
import lightning.pytorch as pl
import pytest
import torch
from PIL import ImageOps

import billhook as bh
from billhook.cli.main import main
from billhook.training.images import ImageDataModule
from kit.cli import pytestmark as quiet
from kit.images import config, picture, write_photos, write_processor

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")]

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def flip(image):
    """Flips half of the images."""
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


class Shift:
    """Adds to the brightness of an image, as a class that a config names."""

    def __init__(self, most: int = 100) -> None:
        self.most = most

    def __call__(self, image):
        added = int(torch.randint(self.most, ()))
        return image.point(lambda value: min(255, value + added))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return write_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def module(photos, processor, **options):
    data = ImageDataModule(photos, processor, **{"batch_size": 4} | options)
    data.setup("fit")
    return data


def passes(data, count=2):
    """What each image becomes in some passes over the training data, by number of the image."""
    loader, found = data.train_dataloader(), []
    for _ in range(count):
        order = list(iter(loader.sampler))
        rows = torch.cat([batch["pixel_values"] for batch in loader])
        loader.sampler.set_epoch(loader.epoch)
        found.append(dict(zip(list(iter(loader.sampler)), rows, strict=True)))
        assert sorted(order) == sorted(found[-1])
    return found


def test_training_images_are_changed_by_seed_and_epoch_and_others_are_not(photos, processor):
    plain, data = module(photos, processor), module(photos, processor, augment=[flip])
    for one, other in zip(plain.val_dataloader()[0], data.val_dataloader()[0], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    state = torch.get_rng_state()
    first, second = passes(data)
    assert torch.equal(torch.get_rng_state(), state)
    flipped = []
    for found in (first, second):
        for number, pixels in found.items():
            same, mirrored = (torch.allclose(pixels, one, atol=1e-2) for one in versions(plain, number))
            assert same != mirrored
            flipped.append(mirrored)
    assert 0 < sum(flipped[:12]) < 12
    assert flipped[:12] != flipped[12:]
    again = passes(module(photos, processor, augment=[flip], batch_size=3))
    assert all(torch.equal(first[number], again[0][number]) and torch.equal(second[number], again[1][number]) for number in first)
    (other,) = passes(module(photos, processor, augment=[flip], seed=1), 1)
    assert not all(torch.equal(first[number], other[number]) for number in first)


def versions(data, number):
    """An image's pixels, and those of its mirror image."""
    pixels = data.splits["train"][number]["pixel_values"]
    return pixels, pixels.flip(-1)


def test_transforms_follow_each_other(processor):
    seen = []
    rows = {"image": [picture(0), picture(1)], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data = ImageDataModule(rows, processor, batch_size=2, validation=0, augment=[lambda image: image.size, seen.append])
    data.setup("fit")
    with pytest.raises(ValueError, match="augment makes a NoneType of an image; its last transform must return an image of PIL"):
        next(iter(data.train_dataloader()))
    assert seen[0] == (24, 20)
    with pytest.raises(ValueError, match="augment=<function"):
        ImageDataModule("photos", augment=flip)


def test_a_resumed_fit_ends_as_the_straight_one(photos, processor, tmp_path):
    def fit(steps, ckpt_path=None):
        torch.manual_seed(0)
        lit = bh.TransformerModule(config(), "image-classification", lr=1e-2, decay="constant")
        data = ImageDataModule(photos, processor, batch_size=4, augment=[flip, Shift()])
        trainer = pl.Trainer(max_steps=steps, enable_model_summary=False, limit_val_batches=0, **QUIET)
        trainer.fit(lit, datamodule=data, ckpt_path=ckpt_path)
        return trainer, lit.model.state_dict()

    _, straight = fit(7)
    trainer, _ = fit(4)
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    _, resumed = fit(7, tmp_path / "4.ckpt")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


CONFIG = """
seed_everything: 0
trainer: {max_steps: 1, logger: false, enable_checkpointing: false, accelerator: cpu, enable_progress_bar: false}
model: {model: MODEL, task: image-classification}
data:
  class_path: ImageDataModule
  init_args:
    data: PHOTOS
    processor: PROCESSOR
    batch_size: 4
    augment:
      - class_path: CLASS
        init_args: {most: 3}
      - training.test_augmented.flip
"""


@pytest.mark.parametrize("name", ["training.test_augmented.Shift", "torchvision.transforms.v2.Resize"])
def test_transforms_are_named_in_a_config(photos, processor, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    config(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    places = {"MODEL": str(tmp_path / "config.json"), "PHOTOS": photos, "PROCESSOR": processor, "CLASS": name}
    text = CONFIG
    for word, place in places.items():
        text = text.replace(word, place)
    (tmp_path / "fit.yaml").write_text(text)
    if name.startswith("training"):
        main(["fit", "--config", str(tmp_path / "fit.yaml")])
        return
    for known in [one for one in sys.modules if one.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(tmp_path / "fit.yaml")])
    assert "torchvision is not installed, of which this is a part: pip install torchvision" in capsys.readouterr().err


class Missing:
    """A finder that finds no torchvision, wherever it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
