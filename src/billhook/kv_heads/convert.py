"""Fewer key/value heads: from multi-head to grouped-query to multi-query attention.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
(https://arxiv.org/abs/2305.13245), section 2.1; Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019
(https://arxiv.org/abs/1911.02150).

With `before` KV heads turned into `after`, each new head replaces a group of `before / after` consecutive old ones:
query head h reads KV head h // (query heads / KV heads), so consecutive heads are the ones whose queries will share.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.batches import Loss, Run
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.methods import KVMethod, Name, Reconstructing, method_of
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model.find import check_changeable, check_values, find_transformer
from billhook.model.plan import Weights, apply
from billhook.model.surgery import changed_names, check_replaceable
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import not_refitted_message

BatchAndLoss = tuple[Any, Loss | None]
"""A batch and, from the model and it, the loss; None for the model's own."""


def best_method(
    attentions: Attentions, methods: Sequence[Reconstructing], trials: Sequence[Run], repair: RepairConfig | None = None
) -> tuple[Reconstructing, dict[Reconstructing, float]]:
    """Finds the allowed method that stays nearest to the model's outputs on held-out batches, and how far away each of them is.

    The loss would not do: it varies by chance more than an exact method and one that is nearly so differ.

    Those batches are held out that choose a repair's ridge; each method is repaired before it is compared, where there is more
    than one batch besides.
    """
    choosing = attentions.choosing(len(trials), repair)
    some, besides = attentions.summed(len(choosing), len(attentions.choosing(len(trials) - len(choosing), repair)))
    if not some:
        raise ValueError(f"batches: 'auto' needs 2 at least, as some are held out; got {len(trials)} here")
    seen = [trial for number, trial in enumerate(trials) if number not in choosing]
    held_out = [trial for number, trial in enumerate(trials) if number in choosing]
    distances: dict[Reconstructing, float] = {}
    for grouping, alike in groupby(attentions.allowed(methods), lambda method: method.grouping):
        if grouping == "similar" and not attentions.may_group:
            continue
        for method, new in attentions.reconstructed(list(alike), seen):
            if repair is not None and besides:
                new = attentions.repaired(new, seen, repair)
            distances[method] = attentions.distance(new, held_out)
    return min(distances, key=lambda method: math.inf if math.isnan(distances[method]) else distances[method]), distances


def ready_weights(
    attentions: Attentions, method: KVMethod, batches: Iterable[BatchAndLoss], repair: RepairConfig | None
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
    how = str(method)
    if len(method.candidates) > 1:
        chosen, _ = best_method(attentions, [chosen, *others], trials, repair)
        how = f"{method}: {chosen}"
    ((_, new),) = attentions.reconstructed([chosen], trials)
    if repair is None:
        return new, how
    new = attentions.repaired(new, trials, repair)
    return new, "; ".join(filter(None, [f"{how}, repaired", not_refitted_message(attentions.not_refitted)]))


def batches_needed(method: KVMethod, repair: RepairConfig | None) -> tuple[int, str]:
    """Returns how many batches are needed at least, and what needs them, in words."""
    if repair is not None and method.least_batches < 2:
        return 2, "repair"
    return method.least_batches, f"method='{method.name}'"


def check_ready(model: nn.Module, groups: Mapping[str, int], method: KVMethod, repair: RepairConfig | None = None) -> Attentions:
    """Returns the attentions of a model; refuses one whose heads none of a method's candidates can make ready for fewer."""
    attentions = Attentions(model, groups)
    attentions.allowed(method.candidates)
    attentions.check_adapters(repair)
    return attentions


def turned_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    method: Reconstructing,
    batches: Iterable[BatchAndLoss] = (),
    comm: Comm = SINGLE_PROCESS,
) -> LazyTensors:
    """Returns by parameter the values with which the heads of each group lie in one basis and next to each other.

    Nothing is pooled, and the model computes what it did. Without batches the weights alone say which basis.
    """
    attentions = Attentions(model, groups, comm)
    attentions.check(method)
    trials = [attentions.trial(*pair) for pair in batches]
    return attentions.equal(method, attentions.moments(trials, method.grouping), pool=False)


def convert_kv_heads(
    model: nn.Module,
    num_key_value_heads: int,
    method: KVMethod | Name = "mean",
    batches: Batches | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    repair: RepairConfig | None = None,
    layers: Collection[int | str] | None = None,
    encoder: bool = False,
) -> KVHeadPlan:
    """Turns multi-head attention into grouped-query, or with one KV head multi-query, attention, in place.

    Args:
        model: A Hugging Face model, or a module that holds one.
        num_key_value_heads: KV heads afterwards; divides both the KV heads now and the query heads.
        method: How a group of heads becomes one; any `KVMethod`, or a short name for one with its defaults.

            - `"mean"`: their mean (the paper's choice); `"first"`: the first of them; `"random"`: drawn as the model
              initialises (both the paper's ablation, section 3.3).
            - `"aligned"`: each head is turned so that all of the group agree as far as turns can make them, and queries and
              outputs are turned along, which changes nothing; then their mean. Without batches, the weights alone say how.
            - `"svd"`: the one head, and what each query head and output makes of it, with which least is lost on the batches.
            - `"auto"`: what stays nearest to the model's predictions on held-out batches, also of which heads share a group.

            Where code stands between projection and product (a norm of keys, a gate), what it does not let pass is averaged.
        batches: For `"svd"`, `"auto"`, `"aligned"` and `repair`, as dictionaries of what the model's forward takes; some
            thousand tokens. `"auto"` and `repair` hold some of them out. A `Calibration` reads them; where they are needed
            and there are none, they are what a language model itself writes.
        optimizers: The optimizer, or optimizers, that train the model. Their state follows: first moments are pooled like the
            weights; second moments (of Adam, AdamW, RMSprop, Adadelta, Adagrad) are pooled and multiplied by G^2 for groups of
            G heads. The gradient of a pooled head is the sum of its heads' gradients, and
            (g_1 + ... + g_G)^2 <= G (g_1^2 + ... + g_G^2) = G^2 mean(g_i^2), so the step stays within the optimizer's bound.
            With `"random"` the state of what is drawn starts at zero. Of what is in another basis afterwards, or refitted, it
            restarts.
        repair: If given, the linears that read the heads, and those of feed-forwards, are refitted to make up for what is lost.
        layers: The attentions to convert, by name or by their place in the order in which they run, from 0; by default all that
            have more KV heads. While layers differ the config keeps its number, and gets the new one once all have it.
        encoder: Whether the self-attention of an encoder-decoder's encoder is converted too; as in the paper (section 3.1) it is
            not. A model that is an encoder only is converted all the same.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: If the number, method or layers are not legal, batches are missing, a method does not suit the model, or the
            model cannot be converted; then nothing has changed.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> print(bh.convert_kv_heads(model, 2, "first"))
        LlamaForCausalLM: 8 -> 2 KV heads in 4 attentions (first); the KV cache shrinks
          model.layers.*.self_attn.k_proj.weight  256 -> 64 along dimension 0, in each of 4
          model.layers.*.self_attn.v_proj.weight  256 -> 64 along dimension 0, in each of 4
    """
    check_int("num_key_value_heads", num_key_value_heads)
    check_types(convert_kv_heads, locals())
    method = method_of(method)
    check_repair(method, repair)
    check_changeable(model)
    trained_by = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    check_replaceable(model, trained_by)
    plan = plan_kv_heads(model, num_key_value_heads, method, layers, encoder)
    with store_of(model).restored_on_error():  # covers both steps: a second call resumes from the first
        plan, weights, _ = ready(model, plan, batches, repair)
        apply(model, plan, trained_by, weights)
    return plan


def ready(
    model: nn.Module,
    plan: KVHeadPlan,
    batches: Batches | None = None,
    repair: RepairConfig | None = None,
    attentions: Attentions | None = None,
) -> tuple[KVHeadPlan, Weights, str]:
    """Returns a plan with what restarts, the values that it starts from, and how they came to be; the model stays as it is.

    What is known of the `attentions` is found if it is not given.
    """
    if not plan.method.turns and repair is None:
        return plan, {}, str(plan.method)
    check_values(model, streamed=True)
    model = find_transformer(model)
    least, _ = batches_needed(plan.method, repair)
    calibration = read_batches(batches, model) if least or batches is not None else ()
    attentions = attentions or Attentions(model, dict.fromkeys(plan.layers, plan.after))
    weights, how = ready_weights(attentions, plan.method, [(batch, None) for batch in calibration], repair)
    restart = changed_names(model, weights) if store_of(model).trains else ()
    return replace(plan, restart=tuple(restart)), weights, how


def check_repair(method: KVMethod, repair: RepairConfig | None) -> None:
    """Refuses a repair of heads that nothing makes equal before they are pooled."""
    if repair is not None and not method.candidates:
        raise ValueError(f"repair goes with method 'mean', 'aligned', 'svd' and 'auto', not with '{method.name}'")
