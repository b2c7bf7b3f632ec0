"""Numbers of KV heads, attention modules to convert, and conversion through the config."""

import math
from collections.abc import Collection, Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.kv_heads.layout import KVAttentions, find_kv
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model import (
    FLAG,
    Fields,
    Shape,
    build,
    built_shape,
    field,
    find_transformer,
    nested_configs,
    set_shape,
    shape_beyond_config,
    shape_of,
    to_meta,
    with_fields,
)

FIELD = "num_key_value_heads"
FIELDS = (FIELD, "num_kv_heads")


def cut_by_config(
    model: PreTrainedModel, attentions: KVAttentions, chosen: Collection[str], heads: int, encoder: bool, every: bool
) -> tuple[list[str], Shrunk] | None:
    """Returns the attention modules that follow a changed config, and the new shapes.

    None if no field controls them, or if the model differs from its class in anything else, such as removed heads.

    Args:
        model: The model.
        attentions: All attention modules.
        chosen: Names of the modules to convert.
        heads: New number of KV heads.
        encoder: If True, the config of the encoder changes as well.
        every: If True, all chosen modules must follow.
    """
    usual = built_shape(type(model), model.config)
    for fields in _changed(model, heads, encoder):
        if (built := build(model, fields)) is None:
            continue
        owners = {name: _owner(name, attentions) for name, size in usual.tensors.items() if built.tensors.get(name) != size}
        following = [name for name in chosen if name in owners.values() or attentions[name].rows.keys() & owners.keys()]
        if not following or (every and len(following) < len(chosen)):
            continue
        if not is_as_built(model, usual, owners):
            return None
        for name, owner in owners.items():
            if owner is None:
                raise ValueError(f"{name} follows the number of KV heads in the config, and belongs to no attention module")
        # the config keeps the old number until all attention modules that follow it are converted
        complete = all(owner in following or attentions[str(owner)].heads == heads for owner in owners.values())
        shape = Shape({name: size for name, size in built.shape.tensors.items() if owners.get(name) in following}, {}, {})
        for name, value in built.shape.attributes.items():
            if usual.attributes.get(name, value) != value and (complete or _owner(name, attentions) in following):
                shape.attributes[name] = value
        for name, value in built.shape.config.items() if complete else ():
            if usual.config.get(name, value) != value:
                shape.config[name] = value
        shape = shape.over(shape_of(model))  # attributes set by the user are in neither shape of the class, and stay
        return following, (_matched(model, attentions, following, heads, shape), shape)
    return None


def _changed(model: PreTrainedModel, heads: int, encoder: bool) -> Iterator[Fields]:
    """Yields changed fields for each way in which families state the number of KV heads."""
    ways = [{name: heads} for name in FIELDS]
    if heads == 1:
        ways.append({FLAG: True, FIELD: 1})
    config = model.config
    parts = [config.get_text_config(decoder=True), *([config.get_text_config(encoder=True)] if encoder else [])]
    for way in ways:
        fields: Fields = {}
        for prefix, nested in nested_configs(config):
            stated = any(type(field(nested, name)) is type(value) for name, value in way.items())
            if stated and any(nested is part for part in parts):
                fields |= {f"{prefix}{name}": value for name, value in way.items()}
        # some configs have one number for both
        if fields and _query_heads(with_fields(config, fields)) == _query_heads(config):
            yield fields


def _query_heads(config: PretrainedConfig) -> list[object]:
    parts = (config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    return [getattr(part, "num_attention_heads", None) for part in parts]


def _owner(name: str, attentions: KVAttentions) -> str | None:
    """Returns the attention module that a parameter belongs to."""
    for owner, attention in attentions.items():
        if name in attention.rows:
            return owner
    around = [owner for owner, attention in attentions.items() if name.startswith(f"{attention.units.name}.")]
    return max(around, key=lambda owner: len(attentions[owner].units.name), default=None)


def is_as_built(model: PreTrainedModel, built: Shape, but: Collection[str]) -> bool:
    """Returns whether a model has the shapes that its class builds, except for some tensors."""
    now = shape_of(model).tensors
    if different := sorted(now.keys() ^ built.tensors.keys()):
        adapters = any("lora_" in name or ".base_layer." in name for name in now)
        hint = "merge the adapters first" if adapters else "such a model cannot be converted"
        raise ValueError(
            f"{different[0]} (and {len(different) - 1} more) is not as {type(model).__name__} builds it "
            f"from the model's config: {hint}"
        )
    return all(size == built.tensors[name] for name, size in now.items() if name not in but)


def _matched(
    model: PreTrainedModel, attentions: KVAttentions, following: Collection[str], heads: int, shape: Shape
) -> dict[str, Pooled]:
    """Returns the new position of each row of the shrinking parameters."""
    meta_model = to_meta(model)
    set_shape(meta_model, shape)
    try:
        after = find_kv(meta_model)
    except ValueError as error:
        raise ValueError(f"the code of {type(model).__name__} does not follow with {heads} KV heads: {error}") from error
    numbers = {name: attention.heads for name, attention in after.items()}
    for name, attention in attentions.items():
        expected = heads if name in following else attention.heads
        if numbers.get(name) != expected:
            raise ValueError(
                f"the code of {type(model).__name__} does not follow: {name} would have {numbers.get(name)} KV heads and not "
                f"{expected}" + ("; convert all layers at once" if len(following) < len(attentions) else "")
            )
    before = shape_of(model).tensors
    changed = {name for name, size in before.items() if shape.tensors[name] != size}
    if kept := sorted(changed - dict(model.named_parameters(remove_duplicate=False)).keys()):
        raise ValueError(f"{kept[0]} follows the number of KV heads but is no parameter: it cannot be pooled")
    cuts = {}
    for name in [name for name, _ in model.named_parameters() if name in changed]:
        owner = str(_owner(name, attentions))
        old = before[name]
        new = shape.tensors[name]
        dims = [dim for dim, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if len(dims) != 1:
            raise ValueError(f"{name} goes from {list(old)} to {list(new)}, which involves more than KV heads")
        (dim,) = dims
        now = attentions[owner]
        then = after[owner]
        rows = now.rows_of(name, dim, old[dim])
        keys = rows.keys(now.heads // then.heads)
        new_keys = then.rows_of(name, dim, new[dim]).keys()
        positions = dict(zip(new_keys, range(len(new_keys)), strict=True))
        wrong = set(keys) != positions.keys() or len(positions) != new[dim] or math.prod(old) == 0
        if wrong or (rows.head < 0).any():
            raise ValueError(f"{name} goes from {list(old)} to {list(new)}, and the positions of its heads are unknown")
        cuts[name] = Pooled(dim, tuple(positions[key] for key in keys))
    return cuts


def kv_heads_by_layer(model: nn.Module, encoder: bool = True) -> dict[str, int]:
    """Returns the number of KV heads of each attention module, in running order."""
    model = find_transformer(model)
    attentions = find_kv(model)
    return {name: attentions[name].heads for name in in_scope(model, attentions, encoder)}


def kv_heads_of(model: nn.Module) -> int:
    """Returns the number of KV heads of a Hugging Face model.

    If layers differ, this is the largest number. For an encoder-decoder without such a config field, it is the decoder's.
    """
    model = find_transformer(model)
    stated = config_heads(model)
    if stated is not None:
        return stated
    if not (layers := kv_heads_by_layer(model, encoder=False)):
        raise ValueError(_encoder_only(model))
    return max(layers.values())


def _encoder_only(model: PreTrainedModel) -> str:
    return f"model: {type(model).__name__} has attention only in its encoder. Pass encoder=True to convert it."


def check_kv_heads(num_key_value_heads: int, before: int, query_heads: int) -> None:
    """Raises a ValueError for an illegal number of KV heads."""
    legal = [n for n in range(1, before) if before % n == 0 and query_heads % n == 0]
    if num_key_value_heads not in legal:
        fix = f"Use {', '.join(map(str, legal))}." if legal else "One KV head is the minimum."
        raise ValueError(
            f"num_key_value_heads={num_key_value_heads} must be smaller than {before} and divide both {before} KV heads and "
            f"{query_heads} query heads. {fix}"
        )


def config_heads(model: PreTrainedModel) -> int | None:
    """Returns the number of KV heads in the config; None if there is no such field.

    Raises:
        ValueError: If the config has a different number for each layer.
    """
    config = model.config.get_text_config(decoder=True)
    stated = field(config, FIELD)
    if isinstance(stated, list | tuple):
        raise ValueError(
            f"{type(model).__name__} does not support fewer KV heads: {type(config).__name__}.{FIELD} has a different "
            "number for each layer"
        )
    return stated if isinstance(stated, int) else None


def inside_encoder(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Returns the attention modules in the encoder of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        return set()
    encoder = model.get_encoder()
    prefix = next((name for name, module in model.named_modules() if module is encoder), "")
    return {name for name in names if prefix and name.startswith(f"{prefix}.")}


def in_scope(model: PreTrainedModel, names: Collection[str], encoder: bool) -> list[str]:
    """Returns the modules to convert by default: the decoder's, or all with `encoder`."""
    left_out = set() if encoder else inside_encoder(model, names)
    return [name for name in names if name not in left_out]


def choose(
    model: PreTrainedModel, attentions: KVAttentions, heads: int, layers: Collection[int | str] | None, encoder: bool
) -> list[str]:
    """Returns the modules with more than `heads` KV heads; a ValueError if there are none."""
    names = list(attentions)
    chosen = in_scope(model, names, encoder)
    if layers is not None:
        for layer in layers:
            if layer not in attentions and not (type(layer) is int and 0 <= layer < len(names)):
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ValueError(f"layers: there is no {layer!r}; there are 0 to {len(names) - 1}, in this order: {shown}")
        chosen = [name for number, name in enumerate(names) if name in layers or number in layers]
        if not chosen:
            raise ValueError("layers is empty. Name at least one attention module.")
    if not chosen:
        raise ValueError(_encoder_only(model))
    more = [name for name in chosen if attentions[name].heads > heads]
    if not more:
        check_each(attentions, chosen[:1], heads)
    return more


def check_each(attentions: KVAttentions, names: Collection[str], heads: int) -> None:
    """Raises a ValueError if any of the attention modules cannot have this number of KV heads."""
    for name in names:
        check_kv_heads(heads, attentions[name].heads, attentions[name].queries)


def heads_of(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """Returns query and KV heads of decoder layers; None if layers differ or are unclear."""
    config = model.config.get_text_config(decoder=True)
    query = field(config, "num_attention_heads")
    kv = field(config, FIELD) or query
    unsaid = kv == query and any(hasattr(config, name) for name in (*FIELDS[1:], FLAG))
    if not unsaid and not shape_beyond_config(model).tensors:
        return query if isinstance(query, int) else None, kv if isinstance(kv, int) else None
    counts = set(heads_by_layer(model))
    return counts.pop() if len(counts) == 1 else (None, None)


def heads_by_layer(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Returns query heads and KV heads of each decoder layer; empty if they are unknown."""
    try:
        attentions = find_kv(model)
    except ValueError:
        return []
    return [(attentions[name].queries, attentions[name].heads) for name in in_scope(model, attentions, encoder=False)]
