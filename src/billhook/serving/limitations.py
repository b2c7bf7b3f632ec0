"""Limitations of llama.cpp's converter, and of its architecture `deci`."""

from typing import Any

from transformers import PretrainedConfig

from billhook.model.config_fields import text_config

LONGROPE = ("Phi3ForCausalLM", "MiniCPM3ForCausalLM")
"""Classes whose longrope factors the converter writes."""
FREQUENCY_FACTORS = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")
"""Classes for which llama.cpp reads the tensor `rope_freqs.weight`."""
DECI: dict[str, tuple[tuple[object, ...], str]] = {
    "model_type": (
        ("llama", "mistral", "qwen2", "seed_oss", "phi3"),
        "llama.cpp's architecture deci does not compute {}",
    ),
    "hidden_act": (("silu", "swish"), "llama.cpp's architecture for it computes silu, not {}"),
    "rope_type": (
        ("default", "linear", "llama3", "yarn"),
        "its rotary positions ({}) are not default, linear, llama3, yarn, or longrope with equal factors",
    ),
    "partial_rotary_factor": ((1,), "its rotary positions cover {} of heads instead of full heads"),
}
"""Config values that `deci` computes, and the limitation for others."""


def misread(kind: str, config: PretrainedConfig) -> str:
    """Returns the reason why llama.cpp's converter misreads a model, or an empty string.

    The architecture `deci` may compute such a model (see `deci_limitation`).
    """
    width: int | None = getattr(config, "head_dim", None)
    if config.model_type == "phi3" and width and width * config.num_attention_heads != config.hidden_size:
        return "its converter assumes a head dimension of hidden size / heads"
    if _rope(config).get("rope_type") != "longrope" or kind in LONGROPE:
        return ""
    return "" if kind in FREQUENCY_FACTORS and rope_factors(config) else "its converter drops longrope factors"


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """Returns longrope's divisors of rotary frequencies if they hold at all lengths.

    None if the config has another type, other factors for long texts, or scaled attention.
    """
    rope = _rope(config)
    equal = rope.get("rope_type") == "longrope" and rope.get("short_factor") == rope.get("long_factor")
    return rope.get("short_factor") if equal and rope.get("attention_factor") == 1 else None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the rotary parameters of a config, empty if it has none."""
    rope = getattr(text_config(config), "rope_parameters", None)
    return rope if isinstance(rope, dict) else {}


def deci_limitation(config: PretrainedConfig) -> str | None:
    """Returns the reason why llama.cpp's `deci` cannot compute a model, or None.

    Its layers may differ, and it computes the same as a Llama, and so as every family that differs only in storage order.
    """
    rope = _rope(config)
    needs = {"model_type": config.model_type, "hidden_act": getattr(config, "hidden_act", None)}
    needs["rope_type"] = "default" if rope_factors(config) else rope.get("rope_type", "default")
    needs["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1)
    return next((DECI[field][1].format(value) for field, value in needs.items() if value not in DECI[field][0]), None)
