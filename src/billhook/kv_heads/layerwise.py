"""Attention after attention is converted: which are next, and whether a model can tell how many have been."""

from collections.abc import Mapping

from torch import nn

from billhook.kv_heads.plan import KVHeadPlan
from billhook.kv_heads.scope import kv_heads_by_layer
from billhook.model.find import find_transformer
from billhook.model.meta import to_meta
from billhook.model.shapes.shape import set_shape


def next_layers(heads: Mapping[str, int], fewer: int, share: float) -> list[str]:
    """Returns the attentions that have too many KV heads for their share, the last ones first, in the order in which they run.

    Args:
        heads: The KV heads of all attentions, in the order in which they run.
        fewer: How many each is to have at most.
        share: Which share of the attentions, rounded down.

    >>> next_layers({"a": 8, "b": 8, "c": 8, "d": 1}, fewer=1, share=0.75)
    ['b', 'c']
    """
    left = [name for name, number in heads.items() if number > fewer]
    due = int(share * len(heads) + 1e-9) - (len(heads) - len(left))
    return left[len(left) - due :] if due > 0 else []


def check_in_part(model: nn.Module, part: KVHeadPlan) -> None:
    """Refuses a model whose attentions cannot have been converted in part; it stays as it is.

    Args:
        model: A Hugging Face model, or a module that holds one.
        part: A plan for some of its attentions.

    Raises:
        ValueError: With the attention.
    """
    shadow = to_meta(find_transformer(model))
    set_shape(shadow, part.shape)
    found = kv_heads_by_layer(shadow)
    for name in part.layers:
        if found.get(name) != part.after:
            raise ValueError(
                f"at: {name} cannot have fewer KV heads before others have, as their heads cannot be told apart in the code "
                "that they share: convert all at one step"
            )
