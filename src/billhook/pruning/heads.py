"""Heads are removed from a model, or made zero."""

from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.optim import Optimizer

from billhook.model.find import find_transformer
from billhook.pruning.plan import Plan, plan_found
from billhook.pruning.removal import carry_out
from billhook.tracing.coupling import Structure
from billhook.tracing.trace import trace
from billhook.units.heads import Chosen, check_layers, find_heads
from billhook.units.units import Per


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
