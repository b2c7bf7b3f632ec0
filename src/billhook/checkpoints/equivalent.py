"""Standard checkpoints of unusual shapes: other configs and equivalent architectures."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model import KEY, Shape, built_shape, shape_beyond_config, shape_of, text_config

ANY = object()
"""Any value, for a config field that no code uses."""

FULL = object()
"""A list of layer types without sliding windows, or no list."""


@dataclass(frozen=True)
class Family:
    """An equivalent architecture with the same tensors.

    Attributes:
        name: Prefix of its class names.
        adds: Config fields that the original lacks, with the equivalent value, a field of the original as `=name`, or any value.
            `head_dim` is always allowed.
        lacks: Config fields of the original that it lacks, with the values for which both are equivalent.
    """

    name: str
    adds: Mapping[str, object]
    lacks: Mapping[str, object]


EQUIVALENT = {
    "Llama": (
        Family("Mistral", {"sliding_window": None}, {"attention_bias": False, "mlp_bias": False, "pretraining_tp": ANY}),
        Family("SeedOss", {"attention_out_bias": "=attention_bias", "residual_dropout": 0.0}, {}),
    ),
    "Qwen2": (
        Family(
            "SeedOss",
            {
                "attention_bias": True,
                "attention_out_bias": False,
                "mlp_bias": False,
                "residual_dropout": 0.0,
                "pretraining_tp": ANY,
            },
            {"layer_types": FULL, "use_sliding_window": ANY, "sliding_window": ANY, "max_window_layers": ANY},
        ),
    ),
}
"""Equivalent architectures by class-name prefix of the original, the best known first."""

COUNTED: Mapping[str, tuple[str | tuple[str, ...], bool]] = {
    "num_attention_heads": (".q_proj.weight", True),
    "num_key_value_heads": (".k_proj.weight", True),
    "intermediate_size": ((".mlp.gate_proj.weight", ".mlp.fc1.weight"), False),
    "hidden_size": (".input_layernorm.weight", False),
}
"""Config fields, with the suffixes of tensors that determine them, and True if a unit is a head of `head_dim` rows."""

NOT_COPIED = {"model_type", "auto_map"}
"""Config fields that identify the model type."""

Candidate = tuple[type[PreTrainedModel], PretrainedConfig]


def equivalents(model: PreTrainedModel) -> Iterator[Candidate]:
    """Yields classes and configs that build a model's exact tensors and integer attributes.

    Yields nothing if the model's config describes its shape and inference engines support that. The model's class comes first,
    because many classes use a field `head_dim` that their config does not declare, unless engines ignore that field.
    """
    now = shape_of(model)
    config = model.config
    counts = _counts(now, config)
    if counts is None or text_config(config) is not config:
        return
    heads_fill_hidden_size = counts["head_dim"] * counts.get("num_attention_heads", 0) == counts.get("hidden_size")
    engines_fail = type(model).__name__.startswith("Qwen2") and not heads_fill_hidden_size  # they ignore its `head_dim`
    if not (engines_fail or shape_beyond_config(model, now).tensors):
        return
    for kind, changes, lacks in sorted(_classes(type(model), config), key=lambda row: engines_fail and row[0] is type(model)):
        same_class = kind is type(model)
        config_class = type(config) if same_class else cast(type[PretrainedConfig], kind.config_class)
        copied = _without(config.to_dict(), {KEY} if same_class else {KEY, *NOT_COPIED, *lacks})
        try:
            known = counts if same_class else _without(counts, counts.keys() - _declared(config_class))
            candidate = config_class.from_dict(copied | known | changes | {"architectures": [kind.__name__]})
            built = built_shape(kind, candidate)
        except Exception:  # whatever a class of configs or models raises
            continue
        if built.tensors == now.tensors and all(built.attributes.get(k, v) == v for k, v in now.attributes.items()):
            yield kind, candidate


def _without(fields: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in dropped}


def _classes(
    kind: type[PreTrainedModel], config: PretrainedConfig
) -> Iterator[tuple[type[PreTrainedModel], dict[str, Any], Collection[str]]]:
    """Yields a class and its equivalents, with the config fields that each adds and lacks."""
    yield kind, {}, ()
    if getattr(transformers, kind.__name__, None) is not kind:
        return
    for prefix, families in EQUIVALENT.items():
        task = kind.__name__.removeprefix(prefix)
        for family in families if task[:1].isupper() and task != kind.__name__ else ():
            equivalent = getattr(transformers, family.name + task, None)
            if equivalent is None:
                continue
            # its config must express exactly this config
            declared = _declared(type(config))
            other = _declared(equivalent.config_class)
            added = _added(family, config)
            known = declared - other <= family.lacks.keys() and other - declared <= family.adds.keys() | {"head_dim"}
            for name, value in family.lacks.items():  # a value without effect, so that a family without the field is equivalent
                stated = getattr(config, name, value)
                if value is FULL:
                    known &= stated in (FULL, None) or set(cast(list[str], stated)) == {"full_attention"}
                else:
                    known &= value is ANY or stated == value
            if known and all(getattr(config, name, value) == value for name, value in added.items()):
                yield equivalent, added, family.lacks


def _declared(kind: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in fields(cast(Any, kind)) if not field.name.startswith("_")}


def _added(family: Family, config: PretrainedConfig) -> dict[str, Any]:
    """Returns the fields that a family adds to this config, without unused fields."""
    values = {name: value for name, value in family.adds.items() if value is not ANY}
    names = {name: value.removeprefix("=") for name, value in values.items() if isinstance(value, str) and value.startswith("=")}
    return values | {name: getattr(config, field, None) for name, field in names.items()}


def _counts(shape: Shape, config: PretrainedConfig) -> dict[str, int] | None:
    """Derives config fields from tensor sizes, or returns None if they are inconsistent."""
    sizes = {value for name, value in shape.attributes.items() if name.endswith(".head_dim")}
    if len(sizes) != 1:
        return None
    counts = {"head_dim": sizes.pop()}
    for field, (suffix, per_head) in COUNTED.items():
        rows = {size[0] for name, size in shape.tensors.items() if name.endswith(suffix)}
        if not rows or not hasattr(config, field):
            continue
        unit = counts["head_dim"] if per_head else 1
        if len(rows) > 1 or min(rows) % unit:
            return None
        counts[field] = min(rows) // unit
    return counts
