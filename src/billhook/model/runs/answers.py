"""The answers of a model to small random inputs, by which two ways to compute it are compared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.state import precisely, resting
from billhook.model.config_fields import configs_of
from billhook.model.runs.inputs import make_inputs


def small_inputs(model: nn.Module, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Makes small inputs, as `make_inputs` does, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    made = make_inputs(model, batch, length)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


@torch.no_grad()
def answer(model: PreTrainedModel) -> list[Tensor]:
    """Returns the tensors of real numbers that a model gives, except those of each block: float64, on the CPU."""
    with precisely(), resting(model):
        return _real(model(**small_inputs(model), return_dict=True))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> list[Tensor]:
    """Returns the logits that a model gives, or all that `answer` returns if it gives none: float64, on the CPU."""
    with precisely(), resting(model):
        given = model(**small_inputs(model), return_dict=True)
    logits = {name: value for name, value in given.items() if "logits" in name}
    return _real(logits if {"logits", "prediction_logits"} & logits.keys() else given)


@torch.no_grad()
def cached_answer(model: PreTrainedModel) -> tuple[list[Tensor], Exception | None]:
    """Returns what `answer` does with a key-value cache, then for one token more; ends with the error of what does not run."""
    inputs, found = small_inputs(model), list[Tensor]()
    inputs |= dict.fromkeys({"use_cache"} & inputs.keys(), True)
    configs: list[Any] = [config for config in configs_of(model) if getattr(config, "use_cache", False)]
    try:
        with precisely(), resting(model):
            for config in configs:
                config.use_cache = True
            given = model(**inputs, return_dict=True)
            found += _real(given)
            ids = next((name for name in ("decoder_input_ids", "input_ids") if name in inputs), None)
            cache = next((name for name in ("cache", "past_key_values") if given.get(name) is not None), None)
            if ids is not None and cache is not None:
                more = inputs | {ids: inputs[ids][:, -1:], cache: given[cache]}
                found += _real(model(**more, return_dict=True))
    except Exception as error:  # whatever a model raises
        return found, error
    return found, None


def _real(given: Any) -> list[Tensor]:  # noqa: ANN401 - a dictionary of anything
    values = [value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.cpu().double() for value in values]


def alike(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> bool:
    """Tells whether answers are the same except for rounding."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return False
    return all(_near(a, b, tolerance) for a, b in zip(expected, found, strict=True))


def tolerance(model: PreTrainedModel) -> float:
    """Returns how far answers may be apart, relative to their norm; parts of most models are in float32 at best."""
    return min(1000 * max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)), 0.05)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)  # also what is not finite
    return bool(torch.where(same, 0, a - b).norm() <= tolerance * a[a.isfinite()].norm())
