"""KV-head conversion: from multi-head to grouped-query to multi-query attention.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
(https://arxiv.org/abs/2305.13245), section 2.1; Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019
(https://arxiv.org/abs/1911.02150).

To convert `before` KV heads into `after`, each new head replaces a group of `before / after` consecutive heads. Query head h
reads KV head h // (query heads / KV heads), so the query heads of consecutive KV heads share the new one.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import Loss, Run, cpu_by_default, store_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.distance import EqualHeads
from billhook.kv_heads.methods import KVMethod, Name, Reconstructing, method_of
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model import (
    Weights,
    apply,
    changed_names,
    check_changeable,
    check_replaceable,
    check_values,
    field,
    find_transformer,
)
from billhook.progress import OnProgress
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import not_refitted_message

BatchAndLoss = tuple[Any, Loss | None]
"""A batch, and a function of model and batch that returns the loss; None for the model's own loss."""


def best_method(
    attentions: Attentions, methods: Sequence[Reconstructing], runs: Sequence[Run], repair: RepairConfig | None
) -> tuple[Reconstructing, dict[Reconstructing, float]]:
    """Returns the method that stays closest to the held-out outputs, and all distances.

    Outputs are compared because the loss varies by chance more than two good methods differ. The held-out batches also choose a
    repair's ridge penalty. Each method is repaired, but not matched, before the comparison if more than one other batch remains.
    """
    numbers = attentions.held_out_batches(len(runs), repair)
    repair = repair and replace(repair, match=None)
    some, besides = attentions.summed(len(numbers), len(attentions.held_out_batches(len(runs) - len(numbers), repair)))
    if not some:
        raise ValueError(f"batches: 'auto' needs at least 2, because some are held out; got {len(runs)} here")
    seen = [run for number, run in enumerate(runs) if number not in numbers]
    held_out = [run for number, run in enumerate(runs) if number in numbers]
    distances = {}
    for grouping, alike in groupby(attentions.allowed(methods, repair), lambda method: method.grouping):
        if grouping == "similar" and not attentions.may_group:
            continue
        for method, new in attentions.reconstructed(list(alike), seen):
            if repair is not None and besides:
                new = attentions.repaired(new, seen, repair)
            (distances[method],) = attentions.distances([new], held_out)
    distances = {method: distances[method] for method in methods if method in distances}
    return min(distances, key=lambda method: math.inf if math.isnan(distances[method]) else distances[method]), distances


def equal_heads(
    attentions: Attentions,
    method: KVMethod,
    batches: Iterable[BatchAndLoss],
    repair: RepairConfig | None,
    progress: OnProgress | None = None,
) -> EqualHeads:
    """Returns the parameters with equal heads in each group, and a description of the method.

    Args:
        attentions: The attention modules.
        method: Conversion method; of several `candidates`, the best on held-out batches.
        batches: Batches with their loss (None for the model's own).
        repair: Repair settings for the output layers of attention and MLP modules. None skips the repair.
        progress: Callback with the number of repaired layers and the total.
    """
    chosen, *others = attentions.allowed(method.candidates, repair)
    runs = [attentions.run(*pair) for pair in batches]
    least, what = batches_needed(method, repair)
    (number,) = attentions.summed(len(runs))
    if number < least:
        why = "because some are held out" if least > 1 else "to compute statistics of the heads"
        raise ValueError(f"batches: {what} needs at least {least}, {why}; got {number:g}")
    how = str(method)
    notes = []
    if len(method.candidates) > 1:
        chosen, losses = best_method(attentions, [chosen, *others], runs, repair)
        how = f"{method}: {chosen}"
        notes.append("distances on held-out batches: " + ", ".join(f"{each} {loss:.3g}" for each, loss in losses.items()))
    ((_, new),) = attentions.reconstructed([chosen], runs)
    notes.append(new.how)
    if repair is not None:
        new = attentions.repaired(new, runs, repair, progress)
        how += ", repaired"
        notes.append(not_refitted_message(attentions.not_refitted))
    return replace(new, how="; ".join(filter(None, [how, *notes])))


def batches_needed(method: KVMethod, repair: RepairConfig | None) -> tuple[int, str]:
    """Returns the minimum number of batches, and the argument that requires them."""
    if repair is not None and method.least_batches < 2:
        return 2, "repair"
    return method.least_batches, f"method='{method.name}'"


def find_attentions(model: PreTrainedModel, plan: KVHeadPlan, repair: RepairConfig | None = None) -> Attentions:
    """Returns the attention modules of a plan; a ValueError if no candidate method suits them."""
    attentions = Attentions(model, dict.fromkeys(plan.layers, plan.after))
    attentions.allowed(plan.method.candidates, repair)
    return attentions


@cpu_by_default()
def convert_kv_heads(
    model: nn.Module,
    num_key_value_heads: int | None = None,
    method: KVMethod | Name | None = None,
    batches: Batches | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    repair: RepairConfig | None = None,
    layers: Collection[int | str] | None = None,
    encoder: bool = False,
    kv_cache_bytes: float | None = None,
) -> KVHeadPlan:
    """Converts attention to fewer KV heads (GQA, or MQA with one KV head), in place.

    Args:
        model: A Hugging Face model, or a module that contains one.
        num_key_value_heads: New number of KV heads. It must divide both the old number and the query heads. Defaults to what
            `kv_cache_bytes` allows.
        method: Pooling method for the heads of a group: a `KVMethod`, or a name. Defaults to `"svd"` with `kv_cache_bytes`, or
            else to `"auto"` with batches, and to `"mean"` without.

            - `"mean"`: the mean (the paper's choice); `"first"`: the first head; `"random"`: drawn like new weights (both are the
              paper's ablations, section 3.3).
            - `"aligned"`: rotates the heads of a group toward each other, with their queries and outputs, which changes nothing,
              and takes the mean. Without batches, the rotations follow from the weights.
            - `"svd"`: the best low-rank approximation on the batches.
            - `"auto"`: the method and grouping that stay closest to the model's predictions on held-out batches.

            Dimensions that a norm or gate between projection and product does not let rotate are averaged.
        batches: Calibration batches (dictionaries of forward inputs, some thousand tokens) or a `Calibration`, for `"svd"`,
            `"auto"`, `"aligned"`, and `repair`. `"auto"` and `repair` hold out some of them. Defaults to `"mixed"` and
            `"generated"` text where they are needed.
        optimizers: The optimizer or optimizers that train the model. First moments are pooled like the weights. Second moments
            (of Adam, AdamW, RMSprop, Adadelta, Adagrad) are pooled and multiplied by G^2 for groups of G heads. The gradient of
            a pooled head is the sum of its heads' gradients, and
            (g_1 + ... + g_G)^2 <= G (g_1^2 + ... + g_G^2) = G^2 mean(g_i^2), so the step stays within the optimizer's bound.
            State restarts for heads drawn by `"random"`, and for parameters in a new basis or refitted.
        repair: Repair settings: refits the output layers of attention and MLP modules to compensate for the conversion. Defaults
            to None (off).
        layers: Attention modules to convert, by name or by index in the order in which they run. Defaults to all with more KV
            heads. While layers differ, the config keeps the old number.
        encoder: If True, also converts the encoder's self-attention of an encoder-decoder, which the paper leaves out (section
            3.1). An encoder-only model is always converted.
        kv_cache_bytes: Largest share of the KV cache that stays, in (0, 1), instead of `num_key_value_heads`.

    Returns:
        The plan that was applied.

    Raises:
        ValueError: If an argument is not legal, batches are missing, the method does not suit the model, or the model cannot be
            converted. The model is then unchanged.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> print(bh.convert_kv_heads(model, 2, "first"))
        LlamaForCausalLM: 8 -> 2 KV heads in 4 attention modules (first); the KV cache shrinks
          model.layers.*.self_attn.k_proj.weight  256 -> 64 along dimension 0, in each of 4
          model.layers.*.self_attn.v_proj.weight  256 -> 64 along dimension 0, in each of 4
    """
    if num_key_value_heads is not None:
        check_int("num_key_value_heads", num_key_value_heads)
    check_types(convert_kv_heads, locals())
    heads, method = heads_and_method(model, num_key_value_heads, kv_cache_bytes, method, batches is not None)
    check_repair(method, repair)
    check_changeable(model)
    store_of(model).check_writes_values()
    trained_by = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    check_replaceable(model, trained_by)
    plan = plan_kv_heads(model, heads, method, layers, encoder)
    with store_of(model).restored_on_error():  # covers both steps: a second call resumes from the first
        plan, weights, _ = prepare_heads(model, plan, batches, repair)
        apply(model, plan, trained_by, weights)
    return plan


def heads_and_method(
    model: nn.Module, heads: int | None, kv_cache_bytes: float | None, method: KVMethod | Name | None, has_data: bool
) -> tuple[int, KVMethod]:
    """Returns the number of KV heads and the method, also for a share of the KV cache.

    Raises:
        ValueError: If not exactly one of both is given, or no head is small enough.
    """
    if (heads is None) == (kv_cache_bytes is None):
        what = f"num_key_value_heads={heads!r}, kv_cache_bytes={kv_cache_bytes!r}"
        raise ValueError(f"{what}: pass the number of KV heads, such as 1 for multi-query attention, or a share of the KV cache.")
    named = method_of("svd" if method is None and heads is None else method, has_data)
    if heads is not None:
        return heads, named
    check_fraction("kv_cache_bytes", kv_cache_bytes, "(0, 1)")
    config = find_transformer(model).config
    before = kv_heads_of(model)
    share = float(kv_cache_bytes or 0)
    queries = field(config.get_text_config(decoder=True), "num_attention_heads") or before
    fitting_heads = [n for n in range(1, before) if before % n == queries % n == 0 and n <= share * before]
    if fitting_heads:
        return fitting_heads[-1], named
    raise ValueError(f"kv_cache_bytes={kv_cache_bytes} must be at least {1 / before:.3f}, one of {before} KV heads.")


def prepare_heads(
    model: nn.Module,
    plan: KVHeadPlan,
    batches: Batches | None,
    repair: RepairConfig | None,
    attentions: Attentions | None = None,
    progress: OnProgress | None = None,
) -> tuple[KVHeadPlan, Weights, str]:
    """Returns a plan with its restarts, the initial weights, and a description."""
    if not plan.method.turns and repair is None:
        return plan, {}, str(plan.method)
    check_values(model, streamed=True)
    model = find_transformer(model)
    least, _ = batches_needed(plan.method, repair)
    calibration = read_batches(batches, model) if least or batches is not None else ()
    attentions = attentions or find_attentions(model, plan, repair)
    new = equal_heads(attentions, plan.method, [(batch, None) for batch in calibration], repair, progress)
    restart = changed_names(model, new.values) if store_of(model).trains else ()
    return plan.starting_from(restart, new.rope), new.values, new.how


def check_repair(method: KVMethod, repair: RepairConfig | None) -> None:
    """Raises a ValueError for a repair with a method that does not make heads equal."""
    if repair is not None and not method.candidates:
        raise ValueError(f"repair goes with method 'mean', 'aligned', 'svd' and 'auto', not with '{method.name}'")
