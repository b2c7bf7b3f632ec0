"""Fewer KV heads in models of images, against the dense class with heads pooled and repeated by slices, saved and loaded."""

import copy

import pytest
import torch

import billhook as bh
from kit.image_models import looked, made

MAKERS = ("k_proj", "v_proj")
WIDTH = 4  # of a head
CASES = [("vit", False, 2), ("deit", False, 2), ("beit", False, 2), ("dinov2", False, 2), ("detr", False, 2), ("detr", True, 3)]


def pooled_and_repeated(model, layers, groups):
    """The dense class: each head of keys and values of these attentions replaced by the mean of its group."""
    model = copy.deepcopy(model)
    for layer in layers:
        for maker in (getattr(model.get_submodule(layer), name) for name in MAKERS):
            for one in (maker.weight, maker.bias):
                if one is not None:
                    split = one.data.view(groups, len(one) // WIDTH // groups, -1)
                    split.copy_(split.mean(1, keepdim=True).expand_as(split).clone())
    return model


@pytest.mark.daily("vit-*", "swin-*", "detr-True-3-2")
@pytest.mark.parametrize(
    ("family", "encoder", "attentions", "heads"),
    [*((*case, heads) for case in CASES for heads in (2, 1)), ("swin", False, 4, 1)],  # of Swin's stages the first has two
)
def test_they_equal_the_dense_class_with_heads_pooled_and_repeated(family, encoder, attentions, heads, tmp_path):
    """Of DETR, the decoder's own attention and what reads the encoder, unless the encoder is asked for, too."""
    model = made(family)
    dense = copy.deepcopy(model)
    plan = bh.convert_kv_heads(model, heads, encoder=encoder)
    assert len(plan.layers) == attentions
    reference = pooled_and_repeated(dense, plan.layers, heads)
    assert torch.allclose(looked(model), looked(reference), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(looked(model), looked(dense), rtol=1e-2, atol=1e-2)
    bh.save(model, tmp_path / "out")
    loaded = bh.load(tmp_path / "out").eval()
    assert all(loaded.get_submodule(layer).k_proj.weight.shape[0] == heads * WIDTH for layer in plan.layers)
    assert torch.allclose(looked(loaded), looked(model), rtol=1e-5, atol=1e-6)
