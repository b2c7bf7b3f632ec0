"""Fits that prune weights, of billhook's module and of a user's own."""

import lightning.pytorch as pl
import peft
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

import billhook as bh
from billhook.model.layers import prunable
from kit import fits, prunes
from kit.families import llama, tokens

FEW = {"calibration": 6, "measure_batches": 0}


def module(seed=0):
    return fits.module(seed, intermediate_size=32)  # every linear has 32 inputs


def pruning(*args, **options):
    return prunes.WeightPruning(*args, **FEW | options)


def zeros(pl_module):
    """The smallest and the largest share of zeros of a linear."""
    shares = [(linear.weight == 0).float().mean().item() for linear in prunable(pl_module.model).values()]
    return round(min(shares), 4), round(max(shares), 4)


class Zeros(pl.Callback):
    """The share of zeros at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert zeros(pl_module)[0] == zeros(pl_module)[1]
        self.seen.append(zeros(pl_module)[0])


def checkpoints(folder, **options):
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", **options)


RAMP = bh.schedules.Cubic(final=0.5, start=1, end=7, every=2)


ROUNDS = [0, 0, 0, 0.3438, 0.3438, 0.4688, 0.4688, 0.5]  # int(32 * sparsity) / 32


EPOCHS = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 4}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2]),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 1e-2, max_iter=2),
}


class Plain(pl.LightningModule):
    """A module of a user's own, which knows nothing of billhook; batches are tuples."""

    optimizer = "sgd"

    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = (net or llama()).train()

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        loss = self.net(ids, attention_mask=mask, labels=ids).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](list(self.parameters()))


def loader(rows=16):
    torch.manual_seed(1)
    return DataLoader(TensorDataset(tokens(rows), torch.ones(rows, 12, dtype=torch.long)), batch_size=2)


class Classifier(pl.LightningModule):
    """A classifier of images of a user's own, which knows nothing of billhook."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[16, 16], depths=[1, 1], layer_type="bottleneck", num_labels=3)
        self.net = ResNetForImageClassification(config).train()

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)


def images():
    generator = torch.Generator().manual_seed(1)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": number % 3} for number in range(12)]
    return DataLoader(rows, batch_size=2)


def injected(seed=0, **options):
    """billhook's module, with LoRA in its model; every linear has 32 inputs."""
    lit = fits.module(seed, intermediate_size=32)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(**{"r": 2, "target_modules": "all-linear"} | options), lit.model)
    return lit
