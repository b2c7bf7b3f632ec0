"""Heads are removed from a model, or made zero."""

from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.optim import Optimizer

from billhook.structure.head_plan import plan_heads
from billhook.structure.heads import Chosen, check_layers, find_heads
from billhook.structure.plan import Plan
from billhook.structure.removal import carry_out, zero_units
from billhook.structure.shape import find_transformer
from billhook.structure.trace import trace
from billhook.structure.units import Per


def prune_heads(
    model: nn.Module,
    heads: Chosen,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    per: Per = "head",
) -> Plan:
    """Removes heads from a model in place: it computes what it did with these heads masked, and is smaller.

    Where the config of the model's class, or of a family that computes the same, can say the new number of heads, plain
    `from_pretrained` loads what `bh.save` writes; otherwise the config says the shape beside it, and `bh.load` loads it.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        heads: The heads that go, by layer: its number (in the order in which the attentions run) or the attention's name.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_heads`, or if the model's code does not follow; then nothing has changed.
    """
    subject = find_transformer(model)
    structure = trace(subject)
    plan = plan_heads(subject, heads, per, structure)
    carry_out(plan, subject, structure, find_heads(subject, structure), optimizers)
    return plan


def zero_heads(model: nn.Module, heads: Chosen, per: Per = "head") -> None:
    """Makes zero the weights that read some heads, in place: the model computes what it does with them masked, without a mask.

    Args:
        model: As in `prune_heads`.
        heads: The heads, as in `prune_heads`.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Raises:
        ValueError: If there is no such layer or head.
    """
    subject = find_transformer(model)
    found = find_heads(subject)
    chosen = check_layers(found, heads, per)
    if per == "kv_head":
        chosen = {name: np.flatnonzero(np.isin(found[name].kv_of, own)).tolist() for name, own in chosen.items()}
    zero_units(subject, found, chosen)
