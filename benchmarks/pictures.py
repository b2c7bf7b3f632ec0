"""Fashion-MNIST, and a ViT and a ConvNeXt that are trained on it here: what `images.py` and `images_vs_torch_pruning.py` share.

DATA holds the four files of Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017, 1708.07747), photographs of Zalando's articles in
28 x 28 grey pixels, 10 classes, 60,000 to train on and 10,000 to test on, which Debian ships:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . && mv usr/share/datasets/fashion-mnist DATA

The last 5,000 of the 60,000 are held out, to choose on. No package was found that brings a pretrained classifier which
transformers loads, so each is trained here once, from random weights, and kept in WORK: 5 epochs on images that are mirrored and
shifted at random, and 2 on them as they are, ten minutes of one core both together.
"""

import gzip
import math
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
MEAN, SPREAD, HELD_OUT = 0.2860, 0.3530, 5000
SIZES = {"image_size": 28, "id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
HIDDEN = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
STAGES = {"num_stages": 2, "hidden_sizes": [48, 96], "depths": [2, 2], "layer_scale_init_value": 0.01}
MODELS = {
    "ViT": lambda: ViTForImageClassification(ViTConfig(**HIDDEN, **SIZES, patch_size=7)),
    "ConvNeXt": lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES, **SIZES, patch_size=4)),
}


@dataclass(frozen=True)
class Pictures:
    """Images, uint8 `[n, 28, 28]`, and their classes, int64 `[n]`."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Pictures(self.images[rows], self.labels[rows])

    def batch(self, rows, moved=False):
        """What the models' forward takes: grey in three colours; if `moved`, mirrored, and shifted by up to two pixels."""
        pixels = self.images[rows].float().div(255).sub(MEAN).div(SPREAD)
        if moved:
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
            wide = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-MEAN / SPREAD)
            down, right = torch.randint(0, 5, (2, len(pixels), 1, 1))
            across = torch.arange(28)
            pixels = wide[torch.arange(len(pixels))[:, None, None], down + across[:, None], right + across]
        return {"pixel_values": pixels[:, None].expand(-1, 3, -1, -1).contiguous(), "labels": self.labels[rows]}

    def batches(self, size=64):
        """Batches in order."""
        return [self.batch(slice(start, start + size)) for start in range(0, len(self), size)]


def pictures(folder):
    """The images to train on, held out, and to test on."""

    def read(name, header):
        return torch.frombuffer(bytearray(gzip.decompress((folder / name).read_bytes())[header:]), dtype=torch.uint8)

    train, test = (
        Pictures(read(f"{kind}-images-idx3-ubyte.gz", 16).view(-1, 28, 28), read(f"{kind}-labels-idx1-ubyte.gz", 8).long())
        for kind in ("train", "t10k")
    )
    return train[:-HELD_OUT], train[-HELD_OUT:], test


def train(model, images, steps, lr, size=64, moved=False, hold=lambda: None):
    """Trains all weights by AdamW, with a warm-up and half a cosine; `hold` is called after each step."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    first = max(1, steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / first, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    order = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * size // len(images)))])
    for step in range(steps):
        model(**images.batch(order[step * size : (step + 1) * size], moved)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        hold()
        if step % 200 == 199:
            print(f"step {step + 1} of {steps}", flush=True)
    return model.eval()


@torch.no_grad()
def logits(model, images):
    """The model's answers, `[n, 10]`."""
    return torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in images.batches(250)])


def dense(work, name, images):
    """The trained model, from WORK or trained now."""
    folder = work / name
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        model = train(MODELS[name](), images, 5 * len(images) // 64, 2e-3, moved=True)
        model = train(model, images, 2 * len(images) // 64, 1e-3)
        model.save_pretrained(folder)
        size = {"height": 28, "width": 28}
        ViTImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3).save_pretrained(folder)
    return AutoModelForImageClassification.from_pretrained(folder).eval()
