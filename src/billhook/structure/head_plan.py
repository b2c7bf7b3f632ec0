"""Which heads go, and all that goes with them."""

import numpy as np
from torch import nn

from billhook.structure.coupling import Structure
from billhook.structure.heads import Chosen, check_layers, find_heads
from billhook.structure.plan import Plan, plan_found
from billhook.structure.shape import find_transformer
from billhook.structure.trace import trace
from billhook.structure.units import Per


def plan_heads(model: nn.Module, heads: Chosen, per: Per = "head", structure: Structure | None = None) -> Plan:
    """Finds what goes with some heads: their queries, keys, values, outputs, biases, position biases and adapters.

    A KV head goes with the last of its query heads.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        heads: The heads that go, by layer: its number (in the order in which the attentions run) or the attention's name.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.
        structure: What `trace` has found of the model; by default it is traced.

    Raises:
        ValueError: If there is no such layer or head, a layer would be left without heads, KV heads would serve different
            numbers of query heads, layers that share a position bias would lose different heads, or the heads may not be
            removed at all; the message says why and what is legal.
    """
    subject = find_transformer(model)
    structure = structure or trace(subject)
    found = find_heads(subject, structure)
    chosen = check_layers(found, heads, per)
    if per == "kv_head":
        chosen = {name: np.flatnonzero(np.isin(found[name].kv_of, own)).tolist() for name, own in chosen.items()}
    return plan_found(subject, structure, found, chosen)
