"""`billhook convert`: reduces the KV heads of a checkpoint."""

from dataclasses import replace

from billhook.cli.command_plan import print_dry_run, print_plan, refit_passes, repair_step
from billhook.cli.effort import Effort
from billhook.cli.examples import Examples
from billhook.cli.machine import model_progress
from billhook.cli.one_shot import OneShot
from billhook.cli.refit import NOT_REPAIRED, check_examples, meta_batches, repair_limits
from billhook.cli.streamed import refit_bytes
from billhook.engine import store_of
from billhook.kv_heads.convert import batches_needed, check_repair, find_attentions, heads_and_method, prepare_heads
from billhook.kv_heads.methods import HINT, SVD, KVMethod, Mean, Name, method_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model import apply
from billhook.pruning.repair import RepairOption
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import split_examples

SVD_PASSES = 6
"""About how many calibration passes the statistics of heads and the comparison of methods take."""


def convert(
    model: str,
    out: str,
    examples: Examples,
    effort: Effort,
    num_key_value_heads: int | None = None,
    method: KVMethod | Name | None = None,
    repair: RepairOption = "auto",
    layers: list[int | str] | None = None,
    encoder: bool = False,
    dry_run: bool = False,
    kv_cache_bytes: float | None = None,
    context: int | None = None,
) -> None:
    """Converts a model to grouped-query or multi-query attention, and saves it.

    The checkpoint is verified, and perplexity or accuracy is measured before and after. Reference: Ainslie et al., GQA: Training
    Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023), https://arxiv.org/abs/2305.13245. The paper
    trains the model afterwards, as `billhook fit --config recipe:gqa` does.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Calibration and evaluation data, and the device.
        effort: How close the result stays to the dense model.
        num_key_value_heads: Number of KV heads after conversion; 1 for multi-query attention. It must divide the number of KV
            heads and of query heads.
        method: Pooling method for the heads of a group: "mean" (the paper's), "first", or "random", which need no data;
            "aligned", for which data is optional; "svd" or "auto", which stay closest to the dense model; or any `KVMethod`,
            including a custom class. Defaults to "svd" with kv_cache_bytes, or else to "auto" with data, and to "mean" without.
        repair: Least-squares repair of attention output projections and MLPs (see `RepairConfig`). "auto" does what `effort` says
            if there is data, with a method other than "first" and "random". null keeps the old weights.
        layers: Attention modules to convert, by name or by number in forward order, from 0, such as `0 1`. Defaults to all.
        encoder: If true, also converts the encoder of an encoder-decoder. The paper does not.
        dry_run: If true, prints the plan and writes nothing.
        kv_cache_bytes: Largest share of the KV cache that stays, in (0, 1), instead of `num_key_value_heads`.
        context: Longest text in tokens, for "svd". Rotary frequencies that are nearly equal over that many tokens become equal,
            so less is lost if texts are shorter than the model allows. Defaults to the model's maximum.

    Raises:
        ValueError: If an argument is not legal, or the model cannot be converted, before anything is written.
    """
    if (num_key_value_heads is None) == (kv_cache_bytes is None):
        raise ValueError("Pass num_key_value_heads, such as 1 for multi-query attention, or kv_cache_bytes, such as 0.5.")
    named = method_of("svd" if method is None and kv_cache_bytes is not None else method, examples.data is not None)
    if context is not None:
        if not isinstance(named, SVD):
            raise ValueError(f"context={context} needs method=svd, got {named}. Add --method svd, or remove --context.")
        named = replace(named, context=context)
    required = isinstance(repair, RepairConfig)
    resolved = effort.repair(repair) if required or (examples.data is not None and named.candidates) else None
    repair = RepairConfig() if resolved == "auto" else resolved
    check_repair(named, repair)
    least, needed_by = batches_needed(named, repair)
    calibrates = least > 0 or (named.turns and examples.data is not None)
    work = OneShot(model, out, examples, refits=calibrates, calibrates=calibrates, streams=True, repair=repair, effort=effort)
    store_of(work.model).check_writes_values()
    heads, method = heads_and_method(work.model, num_key_value_heads, kv_cache_bytes, named, examples.data is not None)
    plan = plan_kv_heads(work.model, heads, method, layers, encoder)
    passes, statistics, known = 1, 0, None
    if calibrates:
        check_examples(work, least, needed_by)
    if method.turns or repair is not None:
        known = find_attentions(work.model, plan, repair)
        passes += known.passes(method, repair)
        statistics = known.bytes(method)
    solved, sums = refit_bytes(work.model, repair)
    work.spill(max(statistics, solved), sums, 0 if repair is None else 2)
    steps = [f"convert {plan.before} KV heads to {plan.after} in {len(plan.layers)} attention modules (method: {plan.method})"]
    if repair is not None and known is not None:
        limits = repair_limits(work, known.widths, meta_batches(work), required)
        steps.append(limits or repair_step(work, repair, "attention output projections and MLPs"))
    print_plan(work, *steps, passes=passes, cost=SVD_PASSES if method.turns else 0, refits=refit_passes(work, repair))
    if dry_run:
        print_dry_run(work, plan.text())
        return
    print(plan.text())
    if type(method) is Mean and repair is None:
        print(HINT.removeprefix("billhook: "))
    batches = work.batches() if calibrates else None
    if repair is not None and known is not None and batches is not None:
        limits = repair_limits(work, known.widths, batches, required)  # a text may be shorter than requested
        repair = None if limits.startswith(NOT_REPAIRED) else repair
    if batches is not None and len(batches) < least:
        batches = split_examples(batches)
    before = work.measure()
    work.predict(batches or [])
    with model_progress(work.model, "converting", "" if repair is None else "layers") as progress:
        plan, weights, how = prepare_heads(work.model, plan, batches, repair, known, progress)
        apply(work.model, plan, weights=weights)
    if calibrates:
        print("Method: " + how.replace("; ", "\n  "), flush=True)
    work.save(before, f"{plan.words} ({how})", {"plans": [plan.to_json()], "repair": repair and str(repair)})
