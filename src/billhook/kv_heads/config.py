"""How many KV heads a model has, in which attentions there may be fewer, and what follows where its class builds these."""

import copy
import math
from collections.abc import Collection, Iterator, Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.kv_heads.layout import KVAttention, find_kv
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.config_fields import field
from billhook.model.find import find_transformer
from billhook.model.meta import to_meta
from billhook.model.repeat_kv import repeat_layout_of
from billhook.model.shape import FLAG, Shape, built_shape, set_shape, shape_beyond_config, shape_of

FIELD = "num_key_value_heads"
FIELDS = (FIELD, "num_kv_heads")


def cut_by_config(
    model: PreTrainedModel, attentions: Mapping[str, KVAttention], chosen: Collection[str], heads: int, encoder: bool, every: bool
) -> tuple[list[str], Shrunk] | None:
    """Returns the chosen attentions that follow a changed config, and how the model shrinks; None if the class follows no field.

    With `encoder` the encoder's config changes as well; with `every` all of the chosen must follow. None, too, of a model that in
    anything else is no longer what its class builds, as without some heads.
    """
    usual = built_shape(type(model), model.config)
    for config in _changed(model, heads, encoder):
        try:
            built = built_shape(type(model), config)
        except Exception:  # whatever a class of models raises
            continue
        owners = {name: _owner(name, attentions) for name, size in usual.tensors.items() if built.tensors.get(name) != size}
        following = [name for name in chosen if name in owners.values() or attentions[name].rows.keys() & owners.keys()]
        if not following or (every and len(following) < len(chosen)):
            continue
        if not is_as_built(model, usual, owners):
            return None
        if (lone := next((name for name, owner in owners.items() if owner is None), None)) is not None:
            raise ValueError(f"{lone} follows the number of KV heads in the config, and stands in no attention")
        shape = _difference(usual, built, owners, following, attentions, heads).over(shape_of(model))
        resized = [name for name, owner in owners.items() if owner in following]
        return following, (_matched(model, attentions, following, heads, shape, resized), shape)
    return None


def _changed(model: PreTrainedModel, heads: int, encoder: bool) -> Iterator[PretrainedConfig]:
    """Yields the config, changed in each of the ways in which families state how many KV heads there are."""
    ways: list[dict[str, int]] = [{name: heads} for name in FIELDS]
    if heads == 1:
        ways.append({FLAG: True, FIELD: 1})
    for way in ways:
        config = copy.deepcopy(model.config)
        parts = [config.get_text_config(decoder=True), *([config.get_text_config(encoder=True)] if encoder else [])]
        changed = [_set(part, way) for part in parts]
        if any(changed) and _query_heads(config) == _query_heads(model.config):  # some configs have one number for both
            yield config


def _query_heads(config: PretrainedConfig) -> list[object]:
    parts = (config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    return [getattr(part, "num_attention_heads", None) for part in parts]


def _set(config: PretrainedConfig, fields: Mapping[str, int]) -> bool:
    """Sets fields that are there, and are of that kind; tells whether the first is, without which none is set."""
    known = {name: value for name, value in fields.items() if type(field(config, name)) is type(value)}
    if is_stated := next(iter(fields)) in known:
        for name, value in known.items():
            setattr(config, name, value)
    return is_stated


def _owner(name: str, attentions: Mapping[str, KVAttention]) -> str | None:
    """Returns the attention that a parameter belongs to."""
    for owner, attention in attentions.items():
        if name in attention.rows:
            return owner
    around = [owner for owner, attention in attentions.items() if name.startswith(f"{attention.units.name}.")]
    return max(around, key=lambda owner: len(attentions[owner].units.name), default=None)


def is_as_built(model: PreTrainedModel, built: Shape, but: Collection[str]) -> bool:
    """Finds whether a model is in all but some tensors what its class builds from its config; refuses tensors of other names."""
    now = shape_of(model).tensors
    if different := sorted(now.keys() ^ built.tensors.keys()):
        adapters = any("lora_" in name or ".base_layer." in name for name in now)
        hint = "merge the adapters first" if adapters else "such a model cannot be converted"
        raise ValueError(
            f"{different[0]} (and {len(different) - 1} more) is not as {type(model).__name__} builds it "
            f"from the model's config: {hint}"
        )
    return all(size == built.tensors[name] for name, size in now.items() if name not in but)


def _difference(
    usual: Shape,
    built: Shape,
    owners: Mapping[str, str | None],
    following: Collection[str],
    attentions: Mapping[str, KVAttention],
    heads: int,
) -> Shape:
    """Returns what differs between the two shapes that the class builds: what a user set by hand is in neither, and stays.

    The config says nothing of fewer heads until all attentions that follow it have them.
    """
    complete = all(owner in following or attentions[str(owner)].heads == heads for owner in owners.values())
    shape = Shape({name: size for name, size in built.tensors.items() if owners.get(name) in following}, {}, {})
    for name, value in built.attributes.items():
        if usual.attributes.get(name, value) != value and (complete or _owner(name, attentions) in following):
            shape.attributes[name] = value
    for name, value in built.config.items() if complete else ():
        if usual.config.get(name, value) != value:
            shape.config[name] = value
    return shape


def _matched(
    model: PreTrainedModel,
    attentions: Mapping[str, KVAttention],
    following: Collection[str],
    heads: int,
    shape: Shape,
    names: Collection[str],
) -> dict[str, Pooled]:
    """Finds the new position of each position of what shrinks, from what the model's own code does with it before and after."""
    meta_model = to_meta(model)
    set_shape(meta_model, shape)
    try:
        after = find_kv(meta_model)
    except ValueError as error:
        raise ValueError(f"the code of {type(model).__name__} does not follow with {heads} KV heads: {error}") from error
    numbers = {name: attention.heads for name, attention in after.items()}
    expected = {name: heads if name in following else attention.heads for name, attention in attentions.items()}
    if numbers != expected:
        wrong = next(name for name in expected if numbers.get(name) != expected[name])
        raise ValueError(
            f"the code of {type(model).__name__} does not follow: {wrong} would have {numbers.get(wrong)} KV heads and not "
            f"{expected[wrong]}" + ("; convert all layers at once" if len(following) < len(attentions) else "")
        )
    before = shape_of(model).tensors
    changed = {name for name in names if before[name] != shape.tensors[name]}
    if kept := sorted(changed - dict(model.named_parameters(remove_duplicate=False)).keys()):
        raise ValueError(f"{kept[0]} follows the number of KV heads but is no parameter: it cannot be pooled")
    cuts = {}
    for name, _ in model.named_parameters():
        if name in changed:
            owner = str(_owner(name, attentions))
            cuts[name] = _match(name, attentions[owner], after[owner], before[name], shape.tensors[name])
    return cuts


def _match(name: str, now: KVAttention, then: KVAttention, old: tuple[int, ...], new: tuple[int, ...]) -> Pooled:
    dims = [dim for dim, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(dims) != 1:
        raise ValueError(f"{name} goes from {list(old)} to {list(new)}, which is more than KV heads")
    (dim,) = dims
    keys = now.owned_rows(name, dim, old[dim]).keys(now.heads // then.heads)
    positions = {key: position for position, key in enumerate(then.owned_rows(name, dim, new[dim]).keys())}
    wrong = set(keys) != positions.keys() or len(positions) != new[dim] or math.prod(old) == 0
    if wrong or any(head < 0 for _, head, _ in keys):
        raise ValueError(f"{name} goes from {list(old)} to {list(new)}, and it cannot be told which head is where")
    return Pooled(dim, tuple(positions[key] for key in keys))


def kv_heads_by_layer(model: nn.Module, encoder: bool = True) -> dict[str, int]:
    """Returns the number of KV heads that every attention has, by its name, in the order in which they run."""
    model = find_transformer(model)
    attentions = find_kv(model)
    return {name: attentions[name].heads for name in in_scope(model, attentions, encoder)}


def kv_heads_of(model: nn.Module) -> int:
    """Returns the number of KV heads of a Hugging Face model: as its config states it, or else as its code shows.

    Where layers differ it is the most; of an encoder-decoder whose config has no such field, those of the decoder count.
    """
    model = find_transformer(model)
    stated = config_heads(model)
    if stated is not None and not shape_of(model).handed:
        return stated
    if not (layers := kv_heads_by_layer(model, encoder=False)):
        raise ValueError(_encoder_only(model))
    return max(layers.values())


def _encoder_only(model: PreTrainedModel) -> str:
    return f"model: {type(model).__name__} has attention in its encoder only: encoder=True would convert it"


def check_kv_heads(num_key_value_heads: int, before: int, query_heads: int) -> None:
    """Refuses a number of KV heads that a model with so many heads cannot have; says what is legal."""
    legal = [n for n in range(1, before) if before % n == 0 and query_heads % n == 0]
    if num_key_value_heads not in legal:
        reason = "which must be fewer than there are, and divide both them and the query heads"
        raise ValueError(
            f"num_key_value_heads={num_key_value_heads}, {reason}: with {before} KV heads and {query_heads} query heads, "
            f"legal is {', '.join(map(str, legal)) or 'nothing: one KV head is all there is'}"
        )


def config_heads(model: PreTrainedModel) -> int | None:
    """Returns the number of KV heads in the config; None if it has no such field. Refuses another number for each layer."""
    config = model.config.get_text_config(decoder=True)
    stated = field(config, FIELD)
    if isinstance(stated, list | tuple):
        raise ValueError(
            f"{type(model).__name__} cannot be told to use fewer KV heads: {type(config).__name__}.{FIELD} is what would tell "
            "it, and it says another number for each layer"
        )
    return stated if isinstance(stated, int) else None


def inside_encoder(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Returns the attentions in the encoder of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        return set()
    encoder = model.get_encoder()
    prefix = next((name for name, module in model.named_modules() if module is encoder), "")
    return {name for name in names if prefix and name.startswith(f"{prefix}.")}


def in_scope(model: PreTrainedModel, names: Collection[str], encoder: bool) -> list[str]:
    """Returns the attentions converted by default: of an encoder-decoder those of the decoder, and with `encoder` all."""
    left_out = set() if encoder else inside_encoder(model, names)
    return [name for name in names if name not in left_out]


def choose(
    model: PreTrainedModel,
    attentions: Mapping[str, KVAttention],
    heads: int,
    layers: Collection[int | str] | None,
    encoder: bool,
) -> list[str]:
    """Returns the attentions that are to have fewer KV heads, of those that have more; refuses if there is none."""
    names = list(attentions)
    chosen = in_scope(model, names, encoder)
    if layers is not None:
        for layer in layers:
            if layer not in attentions and not (type(layer) is int and 0 <= layer < len(names)):
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ValueError(f"layers: there is no {layer!r}; there are 0 to {len(names) - 1}, in this order: {shown}")
        wanted = {layer if isinstance(layer, str) else names[layer] for layer in layers}
        chosen = [name for name in names if name in wanted]
        if not chosen:
            raise ValueError("layers is empty: at least one is needed")
    if not chosen:
        raise ValueError(_encoder_only(model))
    more = [name for name in chosen if attentions[name].heads > heads]
    if not more:
        check_each(attentions, chosen[:1], heads)
    return more


def next_layers(heads: Mapping[str, int], fewer: int, share: float) -> list[str]:
    """Returns those of the last attentions, a share of all rounded down, that have more than `fewer` KV heads.

    >>> next_layers({"a": 8, "b": 8, "c": 8, "d": 1}, fewer=1, share=0.75)
    ['b', 'c']
    """
    left = [name for name, number in heads.items() if number > fewer]
    due = int(share * len(heads) + 1e-9) - (len(heads) - len(left))
    return left[len(left) - due :] if due > 0 else []


def check_each(attentions: Mapping[str, KVAttention], names: Collection[str], heads: int) -> None:
    """Refuses a number of KV heads that one of some attentions cannot have."""
    for name in names:
        check_kv_heads(heads, attentions[name].heads, attentions[name].queries)


def hands_out(model: PreTrainedModel, attention: KVAttention) -> bool:
    """Returns whether linears of an attention store fewer heads than they hand out."""
    return any(repeat_layout_of(model.get_submodule(name.rpartition(".")[0])) is not None for name in attention.rows)


def heads_of(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """Returns the query heads and KV heads of a layer: as the config states, or where it does not, as the model's code shows.

    None where layers differ (those of an encoder apart), or heads cannot be told apart.
    """
    config = model.config.get_text_config(decoder=True)
    query = field(config, "num_attention_heads")
    kv = field(config, FIELD) or query
    unsaid = kv == query and any(hasattr(config, name) for name in (*FIELDS[1:], FLAG))
    if not unsaid and not shape_beyond_config(model).tensors:
        return query if isinstance(query, int) else None, kv if isinstance(kv, int) else None
    counts = set(heads_by_layer(model))
    return counts.pop() if len(counts) == 1 else (None, None)


def heads_by_layer(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Returns the query heads and KV heads of each layer, those of an encoder apart; none where heads cannot be told apart."""
    try:
        attentions = find_kv(model)
    except ValueError:
        return []
    return [(attentions[name].queries, attentions[name].heads) for name in in_scope(model, attentions, encoder=False)]
