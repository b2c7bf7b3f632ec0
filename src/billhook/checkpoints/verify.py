"""Verifies a saved checkpoint: reloads it and compares logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.shapes.shaped import load_as
from billhook.model.transformers_internals import attention_of
from billhook.running.undisturbed import undisturbed


def verify(model: PreTrainedModel, folder: Path, probe: Mapping[str, Tensor], kind: type[PreTrainedModel] | None = None) -> float:
    """Reloads a folder in a class, by default the model's, and returns the largest difference of logits.

    Raises:
        RuntimeError: If it is more than rounding in the dtype explains, or the model computes no finite number.
    """
    reloaded = load_as(kind or type(model), str(folder), model.dtype).to(cast(Any, model.device))
    reloaded.set_attn_implementation(cast(str, attention_of(model.config)))
    inputs = {k: v.to(model.device) for k, v in probe.items()}
    with undisturbed(model), undisturbed(reloaded):
        expected, found = (logits_of(m, inputs) for m in (model, reloaded))
    finite = expected.isfinite()
    if not finite.any():
        raise RuntimeError("the model computes no finite logits, so nothing can be verified (it has diverged); it was not saved")
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = float((expected - found)[~same].abs().nan_to_num(torch.inf).max()) if not same.all() else 0.0
    tolerance = 8 * torch.finfo(model.dtype).eps * max(1.0, expected[finite].abs().max().item())
    if difference > tolerance:
        raise RuntimeError(f"the reloaded checkpoint computes other logits: they differ by {difference:.3g}; it was not saved")
    return difference


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Computes the logits in float32, or for a model without a head its first output."""
    output = model(**inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits.float()


def make_probe(config: PretrainedConfig, main_input_name: str) -> dict[str, Tensor]:
    """Makes a random input: 32 token ids that end as a sequence does, or an image."""
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    if main_input_name == "input_ids" and hasattr(text, "vocab_size"):
        length = min(32, getattr(text, "max_position_embeddings", None) or 32)
        ids = torch.randint(text.vocab_size, (1, length), generator=generator)
        if isinstance(end := getattr(text, "eos_token_id", None), int) and 0 <= end < text.vocab_size:
            ids[:, -1] = end  # some classifiers read there
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)}
    raise ValueError(f"probe: a model that reads {main_input_name} needs a batch of its inputs to be verified with")
