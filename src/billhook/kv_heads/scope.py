"""How many KV heads attentions have, which are to have fewer, and how many are legal."""

from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel

from billhook.kv_heads.config import FIELD, FIELDS
from billhook.kv_heads.layout import KVAttention, find_kv
from billhook.model.config_fields import field
from billhook.model.find import find_transformer
from billhook.model.shapes.handed import handing_of
from billhook.model.shapes.shape import FLAG, shape_of, unbuilt_shape


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
