"""Heads, and channels of convolutions with batch norm: cut, saved and loaded, they compute what is left."""

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.nn.functional import conv2d

import billhook as bh
from billhook.units.find import find_units
from kit.image_models import MODELS, STAGES, looked, made
from kit.images import write_photos, write_processor
from kit.units import other

HEADS = ["beit", "dinov2", "detr", "vit", "deit", "swin"]
READS = {  # what reads the channels of one of the places, by the names of the families
    "resnet": "layer.1.convolution", "basic resnet": "layer.1.convolution", "mobilenet_v2": "reduce_1x1.convolution",
    "poolformer": "output.conv2", "regnet": "attention.2", "convnext": "pwconv2", "beit": "fc2", "dinov2": "fc2", "detr": "fc2",
    "vit": "fc2", "deit": "fc2", "swin": "fc2",
}  # fmt: skip


@pytest.mark.daily("resnet-channel", "mobilenet_v2-channel", "swin-head")
@pytest.mark.parametrize(("name", "kind"), [*((name, "channel") for name in MODELS), *((name, "head") for name in HEADS)])
def test_units_go_as_if_they_were_masked(name, kind, tmp_path):
    model = made(name)
    units = find_units(model, kind)
    assert kind == "head" or any(one.readers[0].endswith(READS[name]) for one in units.values())
    gone = {
        place: [number % one.count(), one.count() - 1][: one.count() - 1] for number, (place, one) in enumerate(units.items())
    }
    if (name, kind) == ("detr", "head"):
        assert [place.rpartition("layers.0.")[2] for place in units] == ["self_attn", "self_attn", "encoder_attn"]
    whole = looked(model)
    with bh.mask(model, gone, kind):
        expected = looked(model)
    bh.pruning.prune_units(model, gone, kind=kind)
    assert torch.allclose(looked(model), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(looked(model), whole, rtol=1e-2, atol=1e-2)
    for place, one in find_units(model, kind).items():
        assert one.count() == units[place].count() - len(set(gone[place]))
    bh.save(model, tmp_path / "out")
    assert torch.allclose(looked(bh.load(tmp_path / "out").eval()), looked(model), rtol=1e-4, atol=1e-5)
    model.train()
    looked(model)  # batch norms count in training, too


def test_the_output_norm_of_what_a_convolution_reads():
    """Against the outputs of the convolution itself, given one channel at a time."""
    model = made("basic resnet")
    place = "resnet.encoder.stages.1.layers.0.layer"
    units = {place: find_units(model, "channel")[place]}
    torch.manual_seed(2)
    batches = [{"pixel_values": torch.randn(count, 3, 32, 32)} for count in (2, 3)]
    (scores,) = bh.score(model, units, bh.OutputNorm(), batches).values()
    (reader,) = units[place].readers
    module, given = model.get_submodule(reader), []
    hook = module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    inputs, weight = torch.cat(given), module.weight.detach()
    for channel in range(inputs.shape[1]):
        alone = torch.zeros_like(inputs)
        alone[:, channel] = inputs[:, channel]
        moved = conv2d(alone, weight, None, module.stride, module.padding).movedim(1, -1)
        assert float(scores[channel]) == pytest.approx(float(moved.square().sum(-1).mean().sqrt()), rel=1e-4)


def test_a_plan_takes_the_least_and_says_why_nothing_is_refitted():
    model, batches = made("resnet"), [{"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}]
    units = find_units(model, "channel")
    scores = bh.score(model, units, bh.OutputNorm(), batches)
    plan = bh.plan(model, bh.OutputNorm(), batches, channels=0.5)
    for place, one in units.items():
        assert sorted(plan.units[place]) == sorted(scores[place].argsort()[: one.count() // 2].tolist())
    bh.apply(model, plan)
    assert plan.parameters[1] == sum(one.numel() for one in model.parameters())
    with pytest.raises(ValueError, match="no linear layer consumes the removed units"):
        bh.repair(made("resnet"), bh.plan(made("resnet"), bh.importance.WeightNorm(), channels=0.5), batches)


def test_convolutions_beside_feed_forwards_that_cannot_lose_channels_are_no_places():
    """A conformer's convolutions are normed over their channels, which a mask that no run used may have, too."""
    model = other("Wav2Vec2ConformerForCTC")
    readers = [reader for one in find_units(model, "channel").values() for reader in one.readers]
    assert [reader.rpartition(".")[2] for reader in readers] == ["output_dense"] * 4
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.25))


def test_weights_that_a_convolution_standardises_have_no_channels():
    model = transformers.BitForImageClassification(transformers.BitConfig(embedding_size=8, num_groups=4, **STAGES))
    with pytest.raises(ValueError, match="made or read by a convolution that is no plain nn.Conv1d or nn.Conv2d"):
        find_units(model, "channel")


@pytest.mark.parametrize(
    ("made_of", "reads"),
    [(lambda: made("regnet"), "attention.2"), (lambda: other("EfficientNetForImageClassification"), "expand")],
)
def test_of_convolutions_in_groups_and_of_gated_ones_the_squeeze_alone_has_channels(made_of, reads):
    units = find_units(made_of(), "channel")
    assert units
    assert all(reader.endswith(reads) for one in units.values() for reader in one.readers)


@pytest.mark.parametrize(("name", "kind", "message"), [
    ("dinov2", "residual", "mask_token, which the run never used"),
    ("detr", "residual", "its numbers are used as values"),
])  # fmt: skip
def test_what_stays_is_refused_before_anything_changes(name, kind, message):
    model = made(name)
    before = looked(model)
    with pytest.raises(ValueError, match=message):
        bh.pruning.prune_units(model, {place: [0] for place in find_units(model, kind)}, kind=kind)
    assert torch.equal(looked(model), before)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind", "message"), [
    *(
        (name, "residual", "hidden dimensions cannot be removed from .*: its forward pass")
        for name in ("Pvt", "Segformer", "FocalNet", "Hiera", "Siglip")
    ),
    ("CLIPModel", "residual", "the model's output has it, so that whatever reads the output must follow"),
    ("ConvNextV2", "channel", "a norm spans all of them, so its output would change"),
])  # fmt: skip
def test_what_the_page_says_of_other_families(name, kind, message):
    model = other(name if name.endswith("Model") else f"{name}ForImageClassification")
    before = {own: tensor.clone() for own, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        bh.pruning.prune_units(model, {place: [0] for place in find_units(model, kind)}, kind=kind)
    assert all(torch.equal(tensor, before[own]) for own, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_fit_removes_channels_of_convolutions_and_goes_on(tmp_path):
    write_photos(tmp_path / "photos")
    made("resnet").save_pretrained(tmp_path / "resnet")
    write_processor(tmp_path / "resnet")
    lit = bh.TransformerModule(str(tmp_path / "resnet"), "image-classification", lr=1e-3)
    data = bh.training.ImageDataModule(str(tmp_path / "photos"), batch_size=4)
    cut = bh.StructuredPruning(bh.Amount(channels=0.5), at=2, calibration=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=5, callbacks=[cut, bh.Export(str(tmp_path / "out"))], accelerator="cpu", **quiet)
    trainer.fit(lit, datamodule=data)
    names = [f"resnet.encoder.stages.3.layers.0.layer.{number}" for number in (0, 1)]
    modules = dict(lit.model.named_modules())
    assert [modules[f"{name}.convolution"].weight.shape[0] for name in names] == [4, 4]
    assert [modules[f"{name}.normalization"].running_mean.shape[0] for name in names] == [4, 4]
    (optimizer,) = trainer.optimizers
    trained = [one for group in optimizer.param_groups for one in group["params"]]
    assert len(trained) == len(optimizer.state) == len(list(lit.parameters()))
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in trained)
    assert torch.equal(looked(bh.load(tmp_path / "out").eval()), looked(lit.model.eval()))
