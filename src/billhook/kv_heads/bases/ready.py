"""Makes a model ready for fewer KV heads: weights with which the heads of a group are equal, by any method, repaired if asked."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from billhook.engine.batches import Loss, Run
from billhook.engine.comm import ALONE, Comm
from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.bases.attentions import Attentions
from billhook.kv_heads.methods.base import KVMethod, Rendered
from billhook.repairs.enough import not_refitted
from billhook.repairs.repair import Repair

BatchAndLoss = tuple[Any, Loss | None]
"""A batch and, from the model and it, the loss; None for the model's own."""


def best_method(
    attentions: Attentions, methods: Sequence[Rendered], trials: Sequence[Run], repair: Repair | None = None
) -> tuple[Rendered, dict[Rendered, float]]:
    """Finds the allowed method that stays nearest to the model's outputs on held-out batches, and how far away each of them is.

    The loss would not do: it varies by chance more than an exact method and one that is nearly so differ.

    Those batches are held out that choose a repair's ridge; each method is repaired before it is compared, where there is more
    than one batch besides.
    """
    choosing = attentions.choosing(len(trials), repair)
    held, besides = attentions.summed(len(choosing), len(attentions.choosing(len(trials) - len(choosing), repair)))
    if not held:
        raise ValueError(f"batches: 'auto' needs 2 at least, as some are held out; got {len(trials)} here")
    seen = [trial for number, trial in enumerate(trials) if number not in choosing]
    held_out = [trial for number, trial in enumerate(trials) if number in choosing]
    distances: dict[Rendered, float] = {}
    for grouping, alike in groupby(attentions.allowed(methods), lambda method: method.grouping):
        if grouping == "similar" and not attentions.may_group:
            continue
        for method, new in attentions.rendered(list(alike), seen):
            if repair is not None and besides:
                new = attentions.repaired(new, seen, repair)
            distances[method] = attentions.distance(new, held_out)
    return min(distances, key=lambda method: math.inf if math.isnan(distances[method]) else distances[method]), distances


def made_equal(
    attentions: Attentions, method: KVMethod, batches: Iterable[BatchAndLoss], repair: Repair | None
) -> tuple[LazyTensors, str]:
    """Returns the parameters with which the heads of each group are equal, and how they came to be.

    Args:
        attentions: What is known of the attentions.
        method: How heads become equal; of several `candidates` the best on held-out batches.
        batches: Batches, each with its loss (None for the model's own).
        repair: If given, what reads the heads, and the feed-forwards, are refitted to what the whole model gives.
    """
    attentions.check_adapters(repair)
    chosen, *others = attentions.allowed(method.candidates)
    trials = [attentions.trial(*pair) for pair in batches]
    least, what = batches_needed(method, repair)
    (number,) = attentions.summed(len(trials))
    if number < least:
        why = "as some are held out" if least > 1 else "to see what the heads are given"
        raise ValueError(f"batches: {what} needs {least} at least, {why}; got {number:g}")
    if len(method.candidates) > 1:
        chosen, _ = best_method(attentions, [chosen, *others], trials, repair)
    ((_, new),) = attentions.rendered([chosen], trials)
    if repair is not None:
        new = attentions.repaired(new, trials, repair)
    how = f"{method}: {chosen}" if len(method.candidates) > 1 else str(method)
    if repair is not None:
        how = "; ".join([f"{how}, repaired", *filter(None, [not_refitted(attentions.not_refitted)])])
    return new, how


def batches_needed(method: KVMethod, repair: Repair | None) -> tuple[int, str]:
    """Returns how many batches are needed at least, and what needs them, in words."""
    if repair is not None and method.least_batches < 2:
        return 2, "repair"
    return method.least_batches, f"method='{method.name}'"


def check_ready(model: nn.Module, groups: Mapping[str, int], method: KVMethod, repair: Repair | None = None) -> Attentions:
    """Returns the attentions of a model; refuses one whose heads none of a method's candidates can make ready for fewer."""
    found = Attentions(model, groups)
    found.allowed(method.candidates)
    found.check_adapters(repair)
    return found


def ready_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    method: KVMethod,
    batches: Iterable[BatchAndLoss] = (),
    repair: Repair | None = None,
    comm: Comm = ALONE,
) -> tuple[LazyTensors, str]:
    """Returns by parameter the values with which the heads of each group are equal, and how they came to be.

    Args:
        model: A Hugging Face model; it stays as it is.
        groups: How many KV heads each attention is to have, by the attention's name; others stay as they are.
        method: How heads become equal; of several `candidates` the best on held-out batches.
        batches: Batches, each with its loss (None for the model's own).
        repair: If given, what reads the heads, and the feed-forwards, are refitted to what the whole model gives.
        comm: The ranks.
    """
    return made_equal(Attentions(model, groups, comm), method, batches, repair)


def turned_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    method: Rendered,
    batches: Iterable[BatchAndLoss] = (),
    comm: Comm = ALONE,
) -> LazyTensors:
    """Returns by parameter the values with which the heads of each group lie in one basis and next to each other.

    Nothing is pooled, and the model computes what it did. Without batches the weights alone say which basis.
    """
    attentions = Attentions(model, groups, comm)
    attentions.check(method)
    trials = [attentions.trial(*pair) for pair in batches]
    return attentions.equal(method, attentions.moments(trials, method.grouping), pool=False)
