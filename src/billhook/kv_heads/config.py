"""How many KV heads a model has, in which attentions there may be fewer, and what follows where its class builds these."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.kv_heads.layout import KVAttention, Rows, find_kv
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.config_fields import field
from billhook.model.find import find_transformer
from billhook.model.handed import handing_of
from billhook.model.meta import to_meta
from billhook.model.shape import FLAG, Shape, built_shape, set_shape, shape_of, unbuilt_shape

FIELD = "num_key_value_heads"
FIELDS = (FIELD, "num_kv_heads")


def cut_by_config(
    model: PreTrainedModel, found: Mapping[str, KVAttention], chosen: Collection[str], heads: int, encoder: bool, every: bool
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
        resized = [name for name, size in usual.tensors.items() if built.tensors.get(name) != size]
        follow = {name: _owner(name, found) for name in resized}
        told = [name for name in chosen if name in follow.values() or found[name].rows.keys() & follow.keys()]
        if not told or (every and len(told) < len(chosen)):
            continue
        if not is_as_built(model, usual, resized):
            return None
        if (lone := next((name for name, owner in follow.items() if owner is None), None)) is not None:
            raise ValueError(f"{lone} follows the number of KV heads in the config, and stands in no attention")
        then = _shape_then(shape_of(model), usual, built, follow, told, found, heads)
        own = [name for name, owner in follow.items() if owner in told]
        return told, (_matched(model, found, told, heads, then, own), then)
    return None


def _changed(model: PreTrainedModel, heads: int, encoder: bool) -> Iterator[PretrainedConfig]:
    """Yields the config, changed in each of the ways in which families state how many KV heads there are."""
    ways: list[Callable[[PretrainedConfig], bool]] = [lambda own, name=name: _set(own, name, heads) for name in FIELDS]  # type: ignore[misc]
    if heads == 1:
        ways.append(lambda own: _set(own, FLAG, True) and (_set(own, FIELD, 1) or True))
    for way in ways:
        config = copy.deepcopy(model.config)
        told = [way(config.get_text_config(decoder=True))]
        if encoder:
            told.append(way(config.get_text_config(encoder=True)))
        if any(told) and _query_heads(config) == _query_heads(model.config):  # some configs have one number for both
            yield config


def _query_heads(config: PretrainedConfig) -> list[object]:
    parts = (config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    return [getattr(part, "num_attention_heads", None) for part in parts]


def _set(config: PretrainedConfig, name: str, value: int) -> bool:
    """Sets a field that is there, and is of that kind."""
    there = type(field(config, name)) is type(value)
    if there:
        setattr(config, name, value)
    return there


def _owner(name: str, found: Mapping[str, KVAttention]) -> str | None:
    """Returns the attention that a parameter belongs to."""
    for own, one in found.items():
        if name in one.rows:
            return own
    around = [own for own, one in found.items() if name.startswith(f"{one.units.name}.")]
    return max(around, key=lambda own: len(found[own].units.name), default=None)


def is_as_built(model: PreTrainedModel, built: Shape, but: Collection[str]) -> bool:
    """Finds whether a model is in all but some tensors what its class builds from its config; refuses tensors of other names."""
    now = shape_of(model)
    if different := sorted(now.tensors.keys() ^ built.tensors.keys()):
        adapters = any("lora_" in name or ".base_layer." in name for name in now.tensors)
        hint = "merge the adapters first" if adapters else "such a model cannot be converted"
        raise ValueError(
            f"{different[0]} (and {len(different) - 1} more) is not as {type(model).__name__} builds it "
            f"from the model's config: {hint}"
        )
    return all(size == built.tensors[name] for name, size in now.tensors.items() if name not in but)


def _shape_then(
    now: Shape,
    usual: Shape,
    built: Shape,
    follow: Mapping[str, str | None],
    told: Collection[str],
    found: Mapping[str, KVAttention],
    heads: int,
) -> Shape:
    """Returns the present shape with what differs between the two that the class builds; what a user set by hand stays."""
    complete = all(name in told or found[name].heads == heads for name in {own for own in follow.values() if own is not None})
    tensors = {name: size for name, size in built.tensors.items() if follow.get(name) in told}
    attributes = {name: value for name, value in built.attributes.items() if usual.attributes.get(name, value) != value}
    if not complete:
        attributes = {name: value for name, value in attributes.items() if _owner(name, found) in told}
    config = {k: v for k, v in built.config.items() if usual.config.get(k, v) != v} if complete else {}
    return Shape(tensors, attributes, config).over(now)


def _matched(
    model: PreTrainedModel,
    found: Mapping[str, KVAttention],
    told: Collection[str],
    heads: int,
    then: Shape,
    names: Collection[str],
) -> dict[str, Pooled]:
    """Finds the new place of each position of what shrinks, from what the model's own code does with it before and after."""
    shadow = to_meta(model)
    set_shape(shadow, then)
    try:
        after = find_kv(shadow)
    except ValueError as error:
        raise ValueError(f"the code of {type(model).__name__} does not follow with {heads} KV heads: {error}") from error
    expected = {name: heads if name in told else one.heads for name, one in found.items()}
    if (numbers := {name: one.heads for name, one in after.items()}) != expected:
        wrong = next(name for name in expected if numbers.get(name) != expected[name])
        raise ValueError(
            f"the code of {type(model).__name__} does not follow: {wrong} would have {numbers.get(wrong)} KV heads and not "
            f"{expected[wrong]}" + ("; convert all layers at once" if len(told) < len(found) else "")
        )
    shapes = shape_of(model).tensors
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if kept := sorted(name for name in names if shapes[name] != then.tensors[name] and name not in parameters):
        raise ValueError(f"{kept[0]} follows the number of KV heads but is no parameter: it cannot be pooled")
    cuts = {}
    for name, _ in model.named_parameters():
        if name in names and shapes[name] != then.tensors[name]:
            own = str(_owner(name, found))
            cuts[name] = _match(name, found[own], after[own], shapes[name], then.tensors[name])
    return cuts


def _match(name: str, now: KVAttention, then: KVAttention, old: tuple[int, ...], new: tuple[int, ...]) -> Pooled:
    dims = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(dims) != 1:
        raise ValueError(f"{name} goes from {list(old)} to {list(new)}, which is more than KV heads")
    ours, theirs = (_rows_of(one, name, dims[0], size[dims[0]]) for one, size in ((now, old), (then, new)))
    places = {key: place for place, key in enumerate(theirs.keys())}
    keys = ours.keys(now.heads // then.heads)
    wrong = set(keys) != set(places) or len(places) != new[dims[0]] or math.prod(old) == 0
    if wrong or any(head < 0 for _, head, _ in keys):
        raise ValueError(f"{name} goes from {list(old)} to {list(new)}, and it cannot be told which head is where")
    return Pooled(dims[0], tuple(places[key] for key in keys))


def _rows_of(attention: KVAttention, name: str, dim: int, size: int) -> Rows:
    rows = attention.rows.get(name)
    return rows if rows is not None and rows.dim == dim else attention.rows_beside(name, dim, size)


def kv_heads_by_layer(model: nn.Module, encoder: bool = True) -> dict[str, int]:
    """Returns the number of KV heads that every attention has, by its name, in the order in which they run."""
    model = find_transformer(model)
    found = find_kv(model)
    return {name: found[name].heads for name in in_scope(model, found, encoder)}


def kv_heads_of(model: nn.Module) -> int:
    """Returns the number of KV heads of a Hugging Face model: as its config states it, or else as its code shows.

    Where layers differ it is the most; of an encoder-decoder whose config has no such field, those of the decoder count.
    """
    model = find_transformer(model)
    known = config_heads(model)
    if known is not None and not shape_of(model).handed:
        return known
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
    said = field(config, FIELD)
    if isinstance(said, list | tuple):
        raise ValueError(
            f"{type(model).__name__} cannot be told to use fewer KV heads: {type(config).__name__}.{FIELD} is what would tell "
            "it, and it says another number for each layer"
        )
    return said if isinstance(said, int) else None


def inside_encoder(model: PreTrainedModel, found: Mapping[str, KVAttention]) -> set[str]:
    """Returns the attentions in the encoder of an encoder-decoder."""
    if not model.config.is_encoder_decoder:
        return set()
    inner = model.get_encoder()
    prefix = next((name for name, module in model.named_modules() if module is inner), None)
    return {name for name in found if prefix and name.startswith(f"{prefix}.")}


def in_scope(model: PreTrainedModel, found: Mapping[str, KVAttention], encoder: bool) -> list[str]:
    """Returns the attentions converted by default: of an encoder-decoder those of the decoder, and with `encoder` all."""
    left_out = set() if encoder else inside_encoder(model, found)
    return [name for name in found if name not in left_out]


def choose(
    model: PreTrainedModel,
    found: Mapping[str, KVAttention],
    heads: int,
    layers: Collection[int | str] | None,
    encoder: bool,
) -> list[str]:
    """Returns the attentions that are to have fewer KV heads, of those that have more; refuses if there is none."""
    names = list(found)
    chosen = in_scope(model, found, encoder)
    if layers is not None:
        for layer in layers:
            if layer not in found and not (type(layer) is int and 0 <= layer < len(names)):
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ValueError(f"layers: there is no {layer!r}; there are 0 to {len(names) - 1}, in this order: {shown}")
        wanted = {layer if isinstance(layer, str) else names[layer] for layer in layers}
        chosen = [name for name in names if name in wanted]
        if not chosen:
            raise ValueError("layers is empty: at least one is needed")
    if not chosen:
        raise ValueError(_encoder_only(model))
    more = [name for name in chosen if found[name].heads > heads]
    if not more:
        check_each(found, chosen[:1], heads)
    return more


def next_layers(heads: Mapping[str, int], fewer: int, share: float) -> list[str]:
    """Returns those of the last attentions, a share of all rounded down, that have more than `fewer` KV heads.

    >>> next_layers({"a": 8, "b": 8, "c": 8, "d": 1}, fewer=1, share=0.75)
    ['b', 'c']
    """
    left = [name for name, number in heads.items() if number > fewer]
    due = int(share * len(heads) + 1e-9) - (len(heads) - len(left))
    return left[len(left) - due :] if due > 0 else []


def check_each(found: Mapping[str, KVAttention], names: Collection[str], heads: int) -> None:
    """Refuses a number of KV heads that one of some attentions cannot have."""
    for name in names:
        check_kv_heads(heads, found[name].heads, found[name].queries)


def hands_out(model: PreTrainedModel, attention: KVAttention) -> bool:
    """Returns whether linears of an attention store fewer heads than they hand out."""
    return any(handing_of(model.get_submodule(name.rpartition(".")[0])) is not None for name in attention.rows)


def heads_of(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """Returns the query heads and KV heads of a layer: as the config states, or where it does not, as the model's code shows.

    None where layers differ (those of an encoder apart), or heads cannot be told apart.
    """
    config = model.config.get_text_config(decoder=True)
    query = field(config, "num_attention_heads")
    kv = field(config, FIELD) or query
    unsaid = kv == query and any(hasattr(config, name) for name in (*FIELDS[1:], FLAG))
    if not unsaid and not unbuilt_shape(model).tensors:
        return query if isinstance(query, int) else None, kv if isinstance(kv, int) else None
    counts = set(heads_by_layer(model))
    return counts.pop() if len(counts) == 1 else (None, None)


def heads_by_layer(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Returns the query heads and KV heads of each layer, those of an encoder apart; none where heads cannot be told apart."""
    try:
        found = find_kv(model)
    except ValueError:
        return []
    return [(found[name].queries, found[name].heads) for name in in_scope(model, found, encoder=False)]
