"""Finds configs from which plain from_pretrained builds a model of an unusual shape: its own class's, or another family's."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.model.config_fields import build_class_on_meta, nested_configs, text_config
from billhook.model.costs import kv_cache_bytes
from billhook.model.shape import KEY, Shape, built_shape, shape_beyond_config, shape_of
from billhook.serving.engines import engines

ANY = object()
"""Any value, of a config field that no code reads."""

FULL = object()
"""A list of layers' types, or none, by which no layer sees through a window."""

SUMMARY = tuple(f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))
"""Fields of GPT-2's config for a head for two tasks at once."""


@dataclass(frozen=True)
class Family:
    """A family that computes the same as another one, from tensors of the same names; its linears may be transposed.

    Attributes:
        name: Prefix of the names of its classes.
        adds: Its config fields that the other lacks: the values with which it computes the same, the other's field as `=name`, or
            any. `head_dim` is one for all.
        lacks: Config fields of the other that it lacks: the values at which the other computes the same.
        tasks: Endings of the other's class names that are different in its own.
    """

    name: str
    adds: Mapping[str, object]
    lacks: Mapping[str, object]
    tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)


EQUIVALENT = {
    "Llama": (
        Family(
            "Mistral",
            {"sliding_window": None},
            {"attention_bias": False, "mlp_bias": False, "pretraining_tp": ANY},
        ),
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
    "GPT2": (  # with one KV head
        Family(
            "GPTBigCode",
            {"multi_query": True, "attention_softmax_in_fp32": False, "scale_attention_softmax_in_fp32": False},
            {
                "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False,
                **dict.fromkeys(SUMMARY, ANY),
            },
            {"LMHeadModel": "ForCausalLM"},
        ),
    ),
}
"""Families that can stand for another, the best known first, by the prefix of the other's class names."""

COUNTED: Mapping[str, tuple[str | tuple[str, ...], bool]] = {
    "num_attention_heads": (".q_proj.weight", True),
    "num_key_value_heads": (".k_proj.weight", True),
    "intermediate_size": ((".mlp.gate_proj.weight", ".mlp.fc1.weight"), False),
    "hidden_size": (".input_layernorm.weight", False),
}
"""Config fields: the tensor of each layer that has as many rows, and whether each is of a head, that is `head_dim` rows."""

NOT_COPIED = {"model_type", "auto_map"}
"""Config fields that name its own family."""

Candidate = tuple[type[PreTrainedModel], PretrainedConfig]


def say_head_dim(model: PreTrainedModel) -> None:
    """Fills in the field `head_dim` of configs that leave it empty: transformers computes it then, and SGLang fails."""
    for _, config in nested_configs(model.config):
        if vars(config).get("head_dim", 0) is None:
            modules = [module for module in model.modules() if getattr(module, "config", None) is config]
            sizes = {size for module in modules if type(size := getattr(module, "head_dim", None)) is int}
            config.head_dim = sizes.pop() if len(sizes) == 1 else None


def equivalents(model: PreTrainedModel) -> Iterator[Candidate]:
    """Yields classes, and configs from which they build exactly this model's tensors and whole-number attributes.

    There are none where the model's own config describes it and engines read all that it says. The model's own class comes
    first, as many read the field `head_dim` that their config does not declare; unless engines do not.
    """
    now, config = shape_of(model), model.config
    counts = _counts(now, config)
    if counts is None or text_config(config) is not config:
        return
    classes = {kind for kinds in engines()["computes_head_dim"].values() for kind in kinds}
    computed = tuple(start for start in EQUIVALENT if f"{start}ForCausalLM" in classes)
    misread = type(model).__name__.startswith(computed) and not _is_shared_out(counts)
    if not (misread or shape_beyond_config(model, now).tensors):
        return
    for kind, changes, lacks in sorted(_classes(type(model), config), key=lambda row: misread and row[0] is type(model)):
        same_class = kind is type(model)
        left_out = {KEY} if same_class else {KEY, *NOT_COPIED, *lacks}
        copied = {name: value for name, value in config.to_dict().items() if name not in left_out}
        reads = type(config) if same_class else cast(type[PretrainedConfig], kind.config_class)
        try:
            known = counts if same_class else {name: count for name, count in counts.items() if name in _declared(reads)}
            candidate = reads.from_dict(copied | known | changes | {"architectures": [kind.__name__]})
            built = built_shape(kind, candidate)
        except Exception:  # whatever a class of configs or models raises
            continue
        sizes = now.tensors if same_class else now.tensors | {name: now.tensors[name][::-1] for name in transposed(model, kind)}
        if built.tensors == sizes and all(built.attributes.get(k, v) == v for k, v in now.attributes.items()):
            yield kind, candidate


def cache_as_saved(model: PreTrainedModel) -> int | None:
    """Counts the bytes that the key/value cache grows by with a token, in the class that a checkpoint of the model is loaded in.

    It is less than in memory where the other class caches one head that the model's own repeats.
    """
    kind, config = next(iter(equivalents(model)), (type(model), model.config))
    if kind is type(model):
        return kv_cache_bytes(model)
    return kv_cache_bytes(build_class_on_meta(kind, config).to(cast(Any, model.dtype)))


def transposed(model: PreTrainedModel, kind: type[PreTrainedModel]) -> list[str]:
    """Lists the weights that another class has transposed."""
    linears = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return [f"{name}.weight" for name in linears] if kind is not type(model) else []


def _classes(
    kind: type[PreTrainedModel], config: PretrainedConfig
) -> Iterator[tuple[type[PreTrainedModel], dict[str, Any], Collection[str]]]:
    """Yields the class itself, and those that can stand for it with this config, with the fields that each adds and lacks."""
    yield kind, {}, ()
    if getattr(transformers, kind.__name__, None) is not kind:
        return
    for start, families in EQUIVALENT.items():
        task = kind.__name__.removeprefix(start)
        for family in families if task[:1].isupper() and task != kind.__name__ else ():
            other = getattr(transformers, family.name + family.tasks.get(task, task), None)
            if other is not None and _is_complete(family, config, cast(type[PretrainedConfig], other.config_class)):
                yield other, _added(family, config), family.lacks


def _is_complete(family: Family, config: PretrainedConfig, kind: type[PretrainedConfig]) -> bool:
    """Returns True if a family's config, of the class `kind`, holds all that this config does, and nothing more."""
    declared, other = _declared(type(config)), _declared(kind)
    known = declared - other <= family.lacks.keys() and other - declared <= family.adds.keys() | {"head_dim"}
    neutral = all(_is_neutral(getattr(config, name, value), value) for name, value in family.lacks.items())
    agreed = all(getattr(config, name, value) == value for name, value in _added(family, config).items())
    return known and neutral and agreed


def _is_neutral(stated: object, neutral: object) -> bool:
    """Returns True if a field that the other family lacks changes nothing; `neutral` is the value that it must have."""
    if neutral is FULL:
        return stated in (FULL, None) or set(cast(list[str], stated)) == {"full_attention"}
    return neutral is ANY or stated == neutral


def _declared(kind: type[PretrainedConfig]) -> set[str]:
    return {field.name for field in fields(cast(Any, kind)) if not field.name.startswith("_")}


def _added(family: Family, config: PretrainedConfig) -> dict[str, Any]:
    """Returns the fields that a family's config adds to this one, without those that no code reads."""
    return {
        name: getattr(config, value.removeprefix("="), None) if isinstance(value, str) and value.startswith("=") else value
        for name, value in family.adds.items()
        if value is not ANY
    }


def _is_shared_out(counts: Mapping[str, int]) -> bool:
    """Returns True if the heads are together as wide as the hidden size."""
    return counts["head_dim"] * counts.get("num_attention_heads", 0) == counts.get("hidden_size")


def _counts(shape: Shape, config: PretrainedConfig) -> dict[str, int] | None:
    """Derives config fields from the sizes of a model's tensors; None where layers differ, or give no whole number."""
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
