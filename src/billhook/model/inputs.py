"""Small example inputs for a forward pass, and outputs for comparing two computations."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import evaluating, full_precision, tree_leaves, tree_map_only
from billhook.model.config_fields import configs_of, nested_configs, text_config


def make_inputs(model: nn.Module, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Creates small deterministic inputs by name, on the CPU, for a Hugging Face model."""
    unwrap = getattr(model, "get_base_model", lambda: model)
    return _Maker(unwrap(), batch, length).inputs()


class _Maker:
    """Creates inputs from the main input, signature, and config of a model."""

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        self.model = model
        self.batch = batch
        self.length = length
        config: Any = model.config
        self.config = config
        self.configs = [nested for _, nested in nested_configs(config)]
        # the named parameters of the forward, or of a class above if it has none
        forwards = (model.forward, *(vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)))
        named = (
            {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n != "self"}
            for parameters in (inspect.signature(forward).parameters for forward in forwards)
        )
        self.named = next(filter(None, named), {})
        self.generator = torch.Generator().manual_seed(0)

    def inputs(self) -> dict[str, Any]:
        wanted = {name for name, parameter in self.named.items() if parameter.default is parameter.empty}
        main = getattr(self.model, "main_input_name", "input_ids")
        main = next((n for n in [main, *self.named] if n in self.named and n in _MAKERS and n != "decoder_input_ids"), main)
        wanted.add(main)
        if self.find("is_encoder_decoder"):
            wanted.add("decoder_input_ids")
        if main == "input_ids":  # the other half of a dual encoder, which unlike a decoder has no token in its place
            wanted.update(["bbox"] if self.special("image") else ["bbox", "pixel_values"])
            if self.find("audio_config", "speech_config") is not None and not self.special("audio"):
                wanted.add("input_features")
        if "spatial_shapes" in self.named:
            wanted.update(["spatial_shapes", "pixel_attention_mask"])
        wanted -= {"decoder_input_ids", "bbox", "pixel_values", "input_features"} - self.named.keys()
        if unknown := sorted(wanted - _MAKERS.keys()):
            raise ValueError(
                f"cannot guess the inputs {', '.join(unknown)} of {type(self.model).__name__}. Pass them as example_inputs."
            )
        inputs = {}
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        for name in self.named:
            if name in wanted:
                value = _MAKERS[name](self)
                inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs | ({"use_cache": False} if "use_cache" in self.named else {})

    def find(self, *names: str, default: int | None = None) -> Any:  # noqa: ANN401  (configs hold anything)
        """Returns the first name that is set in the config or in a nested config."""
        values = (getattr(config, name, None) for config in self.configs for name in names)
        return next((value for value in values if value is not None), default)

    def special(self, kind: str = "") -> set[int]:
        """Returns the reserved token ids of the config."""
        ids: set[int] = set()
        for config in self.configs:
            for name, value in vars(config).items():
                if name.endswith(("token_id", "token_index", "token_ids")) and kind in name and value is not None:
                    ids.update(value if isinstance(value, list | tuple) else [value])
        return ids

    def real(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def ids(self, length: int, encoder: bool = True) -> torch.Tensor:
        text: Any = text_config(self.config, encoder)
        size = getattr(text, "vocab_size", None) or self.find("vocab_size", default=100)
        rows = self.batch * (1 if encoder else getattr(text, "num_codebooks", None) or 1)  # of music, one for each codebook
        allowed = torch.tensor(sorted(set(range(size)) - self.special()) or [0])
        return allowed[torch.randint(len(allowed), (rows, length), generator=self.generator)]

    def boxes(self) -> torch.Tensor:
        size = int(self.find("max_2d_position_embeddings", default=1000))
        corners = torch.randint(size // 2, (self.batch, self.length, 4), generator=self.generator)
        corners[..., 2:] += corners[..., :2]
        return corners

    def image(self) -> torch.Tensor:
        if "grid_thw" in self.named:
            return self.patches()
        if "spatial_shapes" in self.named:
            return self.patches().view(self.batch, 16, -1)
        size = self.find("image_size", "img_size", default=32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = self.find("num_channels", "in_channels", "in_chans", default=3)
        frames = self.find("num_frames", "frames_per_clip") if self.find("vocab_size") is None else None
        return self.real(*([frames] if frames else []), channels if isinstance(channels, int) else 3, height, width)

    def patches(self) -> torch.Tensor:
        """Creates flattened image patches, 4 x 4 per image."""
        width = self.find("in_channels", "in_chans", "num_channels", default=3)
        width *= self.find("temporal_patch_size", "patch_temporal", default=1)
        return self.real(16, width * self.find("patch_size", default=14) ** 2).flatten(0, 1)

    def grid(self) -> torch.Tensor:
        return torch.tensor([[1, 4, 4]] * self.batch)

    def wave(self) -> torch.Tensor:
        """Creates a waveform of 16 frames after convolutions, or a spectrogram."""
        kernels = self.find("conv_kernel")
        bins = self.find("num_mel_bins")
        if self.find("audio_channels", "codebook_size"):
            return self.real(1, 2000)
        if isinstance(kernels, list | tuple):
            samples = 16
            for kernel, stride in zip(reversed(kernels), reversed(self.find("conv_stride")), strict=True):
                samples = (samples - 1) * stride + kernel
            return self.real(samples)
        return self.real(self.find("max_length", default=32), bins) if bins else self.real(2000)

    def features(self) -> torch.Tensor:
        """Creates a spectrogram, with bins first if a convolution uses them as channels."""
        bins = self.find("num_mel_bins")
        if any(isinstance(m, nn.Conv1d) and m.in_channels == bins for m in self.model.modules()):
            return self.real(bins, 2 * self.find("max_source_positions", default=16))
        bins = bins or self.find("input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", default=80)
        return self.real(32, bins)


_MAKERS: dict[str, Callable[[_Maker], torch.Tensor]] = {
    "input_ids": lambda maker: maker.ids(maker.length),
    "decoder_input_ids": lambda maker: maker.ids(5, encoder=False),
    "bbox": _Maker.boxes,
    "pixel_values": _Maker.image,
    "pixel_values_videos": _Maker.image,
    "hidden_states": _Maker.patches,
    "grid_thw": _Maker.grid,
    "spatial_shapes": lambda maker: maker.grid()[:, 1:],
    "pixel_attention_mask": lambda maker: torch.ones(maker.batch, 16, dtype=torch.long),
    "input_values": _Maker.wave,
    "input_features": _Maker.features,
}


def small_inputs(model: nn.Module, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Creates small inputs like `make_inputs`, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(device), make_inputs(model, batch, length))
    return inputs


@torch.no_grad()
def run_outputs(model: PreTrainedModel, ids: Mapping[str, Tensor] = {}, layers: Iterable[str] = ()) -> list[Tensor]:
    """Returns the floating-point outputs of layers and of a model: float64, on the CPU.

    Inputs are random, except for these token ids.
    """
    outputs = []
    with ExitStack() as hooks, full_precision(), evaluating(model):
        for layer in sorted(layers):
            hooks.callback(model.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        output = model(**{**small_inputs(model), **ids})
    return _real([*outputs, *(output.values() if isinstance(output, Mapping) else tree_leaves(output))])


@torch.no_grad()
def cached_outputs(model: PreTrainedModel) -> tuple[list[Tensor], Exception | None]:
    """Returns outputs with a KV cache, then for another token, and the error if any."""
    inputs = small_inputs(model)
    numbers = []
    inputs |= dict.fromkeys({"use_cache"} & inputs.keys(), True)
    configs = [config for config in configs_of(model) if getattr(config, "use_cache", False)]  # `resting` unsets it
    try:
        with full_precision(), evaluating(model):
            for config in configs:
                config.use_cache = True
            output = model(**inputs, return_dict=True)
            numbers += _real(output.values())
            ids = next(filter(inputs.__contains__, ("decoder_input_ids", "input_ids")), None)
            cache = next((name for name in ("cache", "past_key_values") if output.get(name) is not None), None)
            if ids is not None and cache is not None:
                inputs |= {ids: inputs[ids][:, -1:], cache: output[cache]}
                numbers += _real(model(**inputs, return_dict=True).values())
    except Exception as error:  # any error of a model
        return numbers, error
    return numbers, None


def _real(outputs: Iterable[object]) -> list[Tensor]:
    values = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.cpu().double() for value in values]


def outputs_match(expected: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> bool:
    """Returns whether outputs are equal up to rounding."""
    if len(expected) != len(other):
        return False
    for a, b in zip(expected, other, strict=True):
        if a.shape != b.shape:
            return False
        same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)  # also what is not finite
        if not torch.where(same, 0, a - b).norm() <= tolerance * a[a.isfinite()].norm():
            return False
    return True


def tolerance(model: PreTrainedModel) -> float:
    """Returns the tolerance for outputs, relative to their norm.

    It is at least that of float32, in which parts of most models run.
    """
    return min(1000 * max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)), 0.05)
