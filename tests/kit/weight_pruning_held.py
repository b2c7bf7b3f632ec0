"""A plain fit, and its data."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from kit.families import llama, tokens

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
