"""Small dense checkpoints to stream, and what is saved compared with what stands in memory."""

import torch
from small_configs import small_config

import billhook as bh


def written(kind, folder):
    """Writes a small random model of a class to a folder, and returns the folder."""
    torch.manual_seed(0)
    kind(small_config(kind.config_class)).eval().save_pretrained(folder)
    return folder


def same(folder, model):
    """Tells whether a folder holds just the tensors of a model."""
    found, expected = bh.load(folder).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())
