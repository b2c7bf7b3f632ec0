"""Convolutions are pruned as linears over patches: every criterion as an own computation on `torch.nn.functional.unfold` says."""

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad, unfold
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

import billhook as bh
from billhook.engine.sharding import full_tensor
from billhook.model.layers import prunable
from billhook.sparsity.criteria import Random, WandaAlpha
from kit import prunes
from kit.sparsity import CRITERIA, stable_sort_layer, stable_sort_rows

GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "circular"},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": "same", "padding_mode": "replicate"},
    "point": {"kernel_size": 1, "stride": 2},
    "1d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1d grouped": {"kernel_size": 3, "groups": 2, "dilation": 2},
    "1d depthwise": {"kernel_size": 4, "groups": 8, "padding": 1, "padding_mode": "circular"},
}
OF_ROWS = [one for one in CRITERIA if one not in (Random, WandaAlpha)]
PADDINGS = {"strided": (0, 0, 1, 1), "grouped": (1,) * 4, "depthwise": (1,) * 4, "1d": (1, 1), "1d depthwise": (1, 1)}


def case(geometry):
    """A convolution, and batches whose channels differ in size and go together."""
    torch.manual_seed(0)
    convolution = (nn.Conv1d if geometry.startswith("1d") else nn.Conv2d)(8, 16, **GEOMETRIES[geometry])
    mix, places = torch.eye(8) + 0.2 * torch.randn(8, 8), (25,) if geometry.startswith("1d") else (7, 6)
    sizes = (8, *(1 for _ in places))
    batches = [torch.einsum("bc...,cd->bd...", torch.randn(3, 8, *places), mix) * torch.rand(sizes) for _ in range(2)]
    return convolution, batches


def unfolded(convolution, inputs, padding=()):
    """What outputs read, by group: `[groups, patches, taps * channels]`, channels innermost."""
    mode = convolution.padding_mode.replace("zeros", "constant")
    kernel, dilation, stride = convolution.kernel_size, convolution.dilation, convolution.stride
    inputs = pad(inputs, padding, mode)
    if len(kernel) == 1:
        inputs, kernel, dilation, stride = inputs.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    read = unfold(inputs, kernel, dilation, 0, stride)  # [batch, channels * taps, places]
    apart = read.unflatten(1, (convolution.groups, -1, kernel[0] * kernel[1]))
    return apart.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)


def as_linears(convolution):
    """The weights of a convolution's groups, `[groups, out, taps * channels]`."""
    return convolution.weight.detach().movedim(1, -1).flatten(1).unflatten(0, (convolution.groups, -1))


def prune_one(convolution, criterion, batches, *amount, **settings):
    pruned = copy.deepcopy(convolution)
    prunes.prune(nn.Sequential(pruned), criterion, batches, *amount, convolutions="all", **settings)
    return as_linears(pruned)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_wanda_and_magnitude(geometry):
    convolution, batches = case(geometry)
    weights = as_linears(convolution)
    norms = torch.cat([unfolded(convolution, one, PADDINGS.get(geometry, ())) for one in batches], 1).square().sum(1).sqrt()
    scores = weights.abs() * norms[:, None]
    width = scores.shape[-1]
    keep = stable_sort_rows(scores.flatten(0, 1), width // 2).view_as(scores)
    torch.testing.assert_close(prune_one(convolution, bh.Wanda(), batches, 0.5), weights * keep)
    by_layer = stable_sort_layer(scores.flatten(0, 1), scores.numel() // 2).view_as(scores)
    torch.testing.assert_close(prune_one(convolution, bh.Wanda(compares="layer"), batches, 0.5), weights * by_layer)
    ascending, order = scores.flatten(0, 1).sort(1)
    shares = torch.zeros_like(ascending).scatter(1, order, ascending.cumsum(1) / ascending.sum(1, keepdim=True))
    by_share = stable_sort_layer(shares, shares.numel() // 2).view_as(scores)
    torch.testing.assert_close(prune_one(convolution, WandaAlpha(), batches, 0.5), weights * by_share)
    by_size = stable_sort_layer(weights.abs().flatten(0, 1), scores.numel() // 2).view_as(scores)
    torch.testing.assert_close(prune_one(convolution, bh.Magnitude(), None, 0.5), weights * by_size)


@pytest.mark.daily("Wanda-*", "SparseGPT-*", "*-grouped-*sparsity*")
@pytest.mark.filterwarnings("ignore:X.T X is not positive definite")
@pytest.mark.parametrize(
    ("geometry", "amount"),
    [
        *((geometry, {"sparsity": 0.5}) for geometry in GEOMETRIES),
        *((geometry, {"pattern": "2:4"}) for geometry in GEOMETRIES if "depthwise" not in geometry),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", OF_ROWS, ids=lambda kind: kind.__name__)
def test_every_criterion_is_that_of_one_linear_for_each_group(kind, amount, geometry):
    """Whose inputs, and groups of 2:4, are the channels at one tap; those of linears have tests of their own."""
    convolution, batches = case(geometry)
    criterion = kind(compares="row") if any(one.name == "compares" and one.init for one in fields(kind)) else kind()
    expected = []
    for number, weight in enumerate(as_linears(convolution)):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        read = [unfolded(convolution, one, PADDINGS.get(geometry, ()))[number] for one in batches]
        prunes.prune(nn.Sequential(linear), criterion, read, **amount)
        expected.append(linear.weight.detach())
    torch.testing.assert_close(prune_one(convolution, criterion, batches, **amount), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "criterion", [bh.Magnitude(), bh.Wanda(), bh.SparseGPT(), bh.criteria.Refit(), bh.criteria.ALPS()], ids=str
)
def test_patterns_are_along_channels(criterion):
    convolution, batches = case("plain")
    bh.prune(nn.Sequential(convolution), criterion, batches, pattern="2:4")
    zeros = convolution.weight.unflatten(1, (-1, 4)) == 0
    assert (zeros.sum(2) == 2).all()


def test_patterns_are_refused_where_channels_are_not_a_multiple():
    model = nn.Sequential(nn.Conv2d(6, 8, 2))  # 24 inputs, of 6 channels
    with pytest.raises(ValueError, match="0 has 6 channels, not a multiple of 4. Exclude it"):
        bh.prune(model, bh.Magnitude(), pattern="2:4")
    with pytest.raises(ValueError, match="convolutions='some' must be"):
        prunes.prune(model, bh.Magnitude(), sparsity=0.5, convolutions="some")
    with pytest.raises(ValueError, match="no linear layers"):
        prunes.prune(model, bh.Magnitude(), sparsity=0.5, convolutions="none")


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_convolutions_that_read_one_tensor_read_other_patches_of_it(sequential):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model, batches = ResNetForImageClassification(config).eval(), [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    dense, seen = copy.deepcopy(model), {}
    first, shortcut = (f"resnet.encoder.stages.1.layers.0.{one}.convolution" for one in ("layer.0", "shortcut"))
    for name in (first, shortcut):
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    others = [name for name in prunable(model) if name not in (first, shortcut)]
    dense(**batches[0])
    assert seen[first].data_ptr() == seen[shortcut].data_ptr()
    prunes.prune(model, bh.Wanda(), batches, 0.5, skip=others, sequential=sequential)
    for name, padding in ((first, (1, 1, 1, 1)), (shortcut, (0, 0, 0, 0))):
        old = dense.get_submodule(name)
        weight = as_linears(old)[0]
        scores = weight.abs() * unfolded(old, seen[name], padding)[0].square().sum(0).sqrt()
        keep = stable_sort_rows(scores, scores.shape[1] // 2)
        torch.testing.assert_close(as_linears(model.get_submodule(name))[0], weight * keep)


def test_places_that_are_padding_do_not_count():
    convolution, inputs = nn.Conv1d(8, 4, 3, padding=1), torch.randn(2, 8, 6)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])

    class Padded(nn.Module):
        def __init__(self, convolution):
            super().__init__()
            self.convolution = convolution

        def forward(self, x, attention_mask):
            return self.convolution(x)

    model = Padded(copy.deepcopy(convolution))
    bh.prune(model, bh.Wanda(), [{"x": inputs, "attention_mask": keep}], 0.5)
    read = unfold(inputs[:, :, None], (1, 3), padding=(0, 1)).unflatten(1, (8, 3)).permute(0, 3, 2, 1).flatten(2)
    weight = convolution.weight.detach().movedim(1, -1).flatten(1)
    scores = weight.abs() * read[keep.bool()].square().sum(0).sqrt()
    expected = weight * stable_sort_rows(scores, 12)
    torch.testing.assert_close(model.convolution.weight.detach().movedim(1, -1).flatten(1), expected)


@pytest.mark.parametrize("criterion", [bh.Magnitude(compares="global"), bh.Wanda(compares="global")], ids=str)
def test_convolutions_and_linears_compete(criterion):
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    model, batches = ConvNextForImageClassification(config), [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    plan = prunes.prune(model, criterion, batches, 0.5, convolutions="all", sequential="none", dry_run=True)
    bh.apply(model, bh.ModelPlan.from_json(plan.to_json(), model))
    found = prunable(model, convolutions="all")
    zeros, sizes = (
        sum(int(count) for count in every)
        for every in zip(*((int((one.weight == 0).sum()), one.weight.numel()) for one in found.values()), strict=True)
    )
    assert zeros == sizes // 2
    masks = plan.masks(model)
    assert all(torch.equal(masks[name], one.weight != 0) for name, one in found.items())
    assert len({round(float((one.weight == 0).float().mean()), 2) for one in found.values()}) > 3


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.criteria.Refit(), bh.Wanda(compares="global")], ids=str)
def test_sharded_convolutions_become_what_whole_ones_do(mesh, criterion):
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    plain, batches = ConvNextForImageClassification(config).eval(), [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    model = copy.deepcopy(plain)
    for part in (*model.convnext.encoder.stages, model):
        fully_shard(part, mesh=mesh)
    for one in (plain, model):
        prunes.prune(one, criterion, batches, 0.5, convolutions="all", sequential="none", reduce=lambda tensor: tensor)
    assert all(torch.equal(full_tensor(own), other) for own, other in zip(model.parameters(), plain.parameters(), strict=True))
