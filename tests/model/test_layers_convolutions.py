"""Convolutions as linears: which are found, how their matrices lie, and the patches that their outputs read."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

from billhook.model.layers import batched, output_positions, patches, prunable, to_layout, weight_of, weight_view

WHISPER = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
WHISPER |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 16, "max_source_positions": 8, "num_mel_bins": 4}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

CONVOLUTIONS = [
    (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), padding_mode="reflect"), (2, 6, 9, 8)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="replicate"), (2, 6, 5, 4)),
    (nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="circular"), (2, 6, 9, 5)),
    (nn.Conv2d(6, 8, 1, groups=2, stride=2), (6, 5, 4)),
    (nn.Conv1d(6, 6, 3, groups=3, padding="same", dilation=2), (2, 6, 9)),
    (nn.Conv1d(6, 4, 4, stride=3, padding=3), (6, 9)),
]


def convolutions_of(model, which="mixing"):
    found = prunable(model, convolutions=which)
    return [name for name, module in found.items() if isinstance(module, nn.Conv1d | nn.Conv2d)]


@pytest.mark.parametrize(("convolution", "shape"), CONVOLUTIONS, ids=str)
def test_the_matrix_times_the_patches_is_the_convolution(convolution, shape):
    inputs = torch.randn(shape)
    read, matrix = patches(convolution, batched(convolution, inputs)), weight_of(convolution)
    apart = matrix.unflatten(0, (convolution.groups, -1))
    read = read if convolution.groups > 1 else read[..., None, :]
    outputs = torch.einsum("...gi,goi->...go", read, apart).flatten(-2) + convolution.bias
    assert output_positions(convolution, batched(convolution, inputs)) == outputs.shape[:-1]
    torch.testing.assert_close(outputs.movedim(-1, 1), batched(convolution, convolution(inputs)))


@pytest.mark.parametrize(("convolution", "shape"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_a_matrix_is_turned_back_to_how_it_lies(convolution, shape, last):
    if last and isinstance(convolution, nn.Conv2d):
        convolution = convolution.to(memory_format=torch.channels_last)
    weight = convolution.weight
    assert torch.equal(to_layout(convolution, weight_of(convolution)), weight)
    assert torch.equal(to_layout(convolution, weight_view(convolution)), weight)
    assert weight_view(convolution).data_ptr() == weight.data_ptr()


def test_by_default_an_output_reads_four_channels_or_more():
    convnext = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]))
    down = [f"encoder.stages.{stage}.downsampling_layer.1" for stage in (1, 2, 3)]
    depthwise = [f"encoder.stages.{stage}.layers.0.dwconv" for stage in range(4)]
    assert convolutions_of(convnext) == down
    assert set(convolutions_of(convnext, "all")) == {*down, *depthwise, "embeddings.patch_embeddings"}
    assert convolutions_of(convnext, "none") == []
    resnet = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[16, 16], depths=[1, 1]))
    stem = "embedder.embedder.convolution"
    assert set(convolutions_of(resnet, "all")) - set(convolutions_of(resnet)) == {stem}
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8))
    assert convolutions_of(vit) == []
    assert convolutions_of(WhisperModel(WhisperConfig(**WHISPER))) == ["encoder.conv1", "encoder.conv2"]


def test_what_computes_with_other_weights_or_patches_is_left_out():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))

    class Standardised(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Plain(nn.Conv1d):
        pass

    normed = parametrizations.weight_norm(nn.Conv1d(4, 4, 1))
    others = [Padded(4, 4, 2), Standardised(4, 4, 2), normed, nn.ConvTranspose1d(4, 4, 2), nn.Conv3d(4, 4, 1)]
    assert list(prunable(nn.Sequential(*others, Plain(4, 4, 1), nn.Linear(2, 2)), convolutions="all")) == ["5", "6"]
