"""Widths of streams of images: cut, the model is what its class builds of other sizes; no token goes, and no place."""

import pytest
import torch

import billhook as bh
from billhook.units.find import find_units
from kit.image_models import STAGES, convnext, deit, looked, made, resnet, swin, vit

THREE_QUARTERS = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 24}
CASES = {  # by family, what is left of one, the kinds that go for it, and the class built of that
    "vit": (0.75, ["residual", "head", "channel"], lambda: vit(**THREE_QUARTERS)),
    "deit": (0.75, ["residual", "head", "channel"], lambda: deit(**THREE_QUARTERS)),
    "swin": (0.5, ["residual", "head", "channel"], lambda: swin(4, (1, 2))),
    "basic resnet": (0.75, ["residual", "channel"], lambda: resnet([16, 18, 24, 32])),
}


@pytest.mark.daily("vit", "basic resnet")
@pytest.mark.parametrize("family", CASES)
def test_a_model_is_what_its_class_builds_of_other_sizes(family, tmp_path):
    share, kinds, built = CASES[family]
    model = made(family)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stage = "stages.1." if family == "basic resnet" else ""  # others have one layer, and no stream
    gone = {
        place: list(range(1, one.count(), round(1 / (1 - share))))
        for kind in kinds
        for place, one in find_units(model, kind).items()
        if kind == "residual" or stage in place
    }
    whole = looked(model)
    bh.pruning.prune_units(model, gone, kind=kinds)
    plain = built().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(looked(plain), looked(model))
    assert not torch.allclose(looked(model), whole, rtol=1e-2, atol=1e-2)
    for name, tensor in model.state_dict().items():
        if name.endswith(("cls_token", "distillation_token", "position_embeddings")):
            assert tensor.shape[:2] == before[name][:2], "tokens and their positions stay"
        if name.endswith("relative_position_bias_table"):
            assert len(tensor) == before[name][0], "distances within a window stay"
        if tensor.dim() == 4:
            assert tensor.shape[2:] == before[name][2:], "kernels stay"
    bh.save(model, tmp_path / "out")
    assert torch.equal(looked(bh.load(tmp_path / "out").eval()), looked(model))


def test_stages_of_convnext_are_what_their_class_builds_of_other_widths(tmp_path):
    """LayerScale, the depthwise convolutions and their groups, the norms and what leads from stage to stage follow."""
    model = made("convnext")
    before = model.state_dict()
    stages = find_units(model, "residual")
    assert [one.count() for one in stages.values()] == STAGES["hidden_sizes"]
    gone = {place: [1, 5] for place in stages}
    inner = {place: list(range(3, 11)) for place in find_units(model, "channel")}  # four times as wide as the stage
    bh.pruning.prune_units(model, gone | inner, kind=["residual", "channel"])
    assert model.convnext.encoder.stages[1].layers[0].dwconv.groups == 22
    plain = convnext([14, 22, 22, 30]).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(looked(plain), looked(model))
    kept = [number for number in range(24) if number not in (1, 5)]
    scale = "convnext.encoder.stages.1.layers.1.layer_scale_parameter"
    assert torch.equal(model.state_dict()[scale], before[scale][kept])
    bh.save(model, tmp_path / "out")
    assert torch.equal(looked(bh.load(tmp_path / "out").eval()), looked(model))
