"""Attention after attention is converted: which are next, and whether it can be told of a model how far that has come."""

from collections.abc import Mapping

from torch import nn

from billhook.kv_heads.convert import KVHeadPlan
from billhook.kv_heads.layout import find_kv
from billhook.kv_heads.scope import in_scope
from billhook.model.find import find_transformer
from billhook.model.meta import to_meta
from billhook.model.shape import set_shape


def heads_in_scope(model: nn.Module, encoder: bool = False) -> dict[str, int]:
    """The KV heads of all attentions that are to have fewer, by name, in the order in which they run.

    Args:
        model: A Hugging Face model, or a module that holds one.
        encoder: Whether those of an encoder-decoder's encoder are among them.
    """
    model = find_transformer(model)
    found = find_kv(model)
    return {name: found[name].heads for name in in_scope(model, found, encoder)}


def next_in_line(heads: Mapping[str, int], fewer: int, share: float) -> list[str]:
    """The attentions that have too many KV heads for their share, the last ones first to go; in the order in which they run.

    Args:
        heads: The KV heads of all attentions, in the order in which they run.
        fewer: How many each is to have at most.
        share: Which share of the attentions, rounded down.

    >>> next_in_line({"a": 8, "b": 8, "c": 8, "d": 1}, fewer=1, share=0.75)
    ['b', 'c']
    """
    left = [name for name, number in heads.items() if number > fewer]
    due = int(share * len(heads) + 1e-9) - (len(heads) - len(left))
    return left[len(left) - due :] if due > 0 else []


def check_told_apart(model: nn.Module, part: KVHeadPlan) -> None:
    """Refuses a model of which it cannot be told that some attentions have been converted and others not; it stays as it is.

    Args:
        model: A Hugging Face model, or a module that holds one.
        part: A plan for some of its attentions.

    Raises:
        ValueError: With the attention.
    """
    shadow = to_meta(find_transformer(model))
    set_shape(shadow, part.shape)
    found = heads_in_scope(shadow, encoder=True)
    for name in part.layers:
        if found.get(name) != part.after:
            raise ValueError(
                f"at: {name} cannot have fewer KV heads before others have, as their heads cannot be told apart in the code "
                "that they share: convert all at one step"
            )
