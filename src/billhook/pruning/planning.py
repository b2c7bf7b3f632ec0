"""Plans what is removed from a model: `plan` chooses units by their scores, `plan_units` takes those that are given."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.batches import Loss
from billhook.engine.comm import SINGLE_PROCESS, Comm, Reduce
from billhook.importance.activations import OutputNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance, check_has_gradients, score_units
from billhook.importance.taylor import Taylor
from billhook.model.find import find_transformer
from billhook.model.plan import apply_plan
from billhook.model.surgery import check_replaceable
from billhook.progress import OnProgress
from billhook.pruning.amount import Amount
from billhook.pruning.block_plan import BlockPlan, find_block_plan
from billhook.pruning.block_plan import checked_block_plan as tried_blocks
from billhook.pruning.choice import choose_units, rank_units
from billhook.pruning.cut import find_cut
from billhook.pruning.plan import UnitPlan, check_kinds
from billhook.pruning.removal import try_removal
from billhook.pruning.target import RatioSearch
from billhook.tracing.trace import trace
from billhook.units.find import Chosen, check_any, find_units, kinds_of, unit_ids, units_of
from billhook.units.gates import mask
from billhook.units.units import Per, UnitKind, Units


def plan(
    model: nn.Module,
    importance: Importance | None = None,
    batches: Batches | None = None,
    *,
    heads: float | None = None,
    kv_heads: float | None = None,
    channels: float | None = None,
    residual: float | None = None,
    experts: float | None = None,
    blocks: int | float | None = None,
    params: int | float | None = None,
    amount: Amount | None = None,
    scores: Mapping[str, Tensor] | None = None,
    greedy: bool = False,
    loss: Loss | None = None,
    reduce: Reduce | None = None,
) -> UnitPlan | BlockPlan:
    """Chooses the least important units of a model, for `apply` or `mask`; the model stays as it is.

    "LLM-Pruner: On the Structural Pruning of Large Language Models" (Ma, Fang & Wang, 2023, https://arxiv.org/abs/2305.11627),
    section 3, and of blocks "ShortGPT" (Men et al., 2024, https://arxiv.org/abs/2403.03853).

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        importance: Any `Importance`; by default `OutputNorm()`, or `Taylor()` where no module reads some units alone, as
            experts; of blocks `BlockInfluence()`.
        batches: Inputs of the model's forward, as dictionaries, labels included; a causal language model's own inputs are its
            labels where there are none. Padding (by `attention_mask`) does not count. A `Calibration` reads them; by default
            they are what the model itself writes.
        heads: Fraction of the query heads that is removed, in [0, 1), as many of each KV head.
        kv_heads: Fraction of the KV heads, with the query heads that they serve.
        channels: Fraction of the channels of feed-forwards.
        residual: Fraction of the channels of the residual stream (the hidden size).
        experts: Fraction of the experts.
        blocks: Fraction of the blocks of each stack, or their number (int); blocks are planned alone.
        params: Parameters that are left at most, a number (int) or a fraction (float); KV heads and channels are removed for it.
        amount: Instead of the seven above, an `Amount`, which also says other targets, the ranking and what is protected.
        scores: Instead of `importance` and `batches`, the scores of all units that may be removed, as `score` returns them.
        greedy: Of blocks, whether one is removed at a time, and the others are scored again without it.
        loss: From model and batch to the number that is to be small; by default the loss that the model returns.
        reduce: Sums a tensor over ranks, if each has batches of its own.

    Returns:
        The plan; `print` shows it, with what the model then costs, and `plan.units` are the chosen units by place.

    Raises:
        ValueError: If an argument is not legal, a target cannot be reached (then with what can), the units may not be removed,
            or they cannot be scored, as without batches, labels or a finite gradient.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
        >>> {(plan.before[name], plan.after[name]) for name in plan.units}
        {((384,), (288,))}
    """
    check_types(plan, locals())
    by_name = {
        "heads": heads, "kv_heads": kv_heads, "channels": channels, "residual": residual, "experts": experts, "blocks": blocks,
        "params": params,
    }  # fmt: skip
    if amount is not None and (twice := [name for name, value in by_name.items() if value is not None]):
        raise ValueError(f"amount and {twice[0]}: give one of them; an Amount has the other as its own argument")
    amount = amount or Amount(heads, kv_heads, channels, residual, experts, blocks, params)
    return plan_amount(model, amount, importance, batches, scores, greedy, loss, Comm.of(reduce, model))


def plan_amount(
    model: nn.Module,
    amount: Amount,
    importance: Importance | None = None,
    batches: Batches | None = None,
    scores: Mapping[str, Tensor] | None = None,
    greedy: bool = False,
    loss: Loss | None = None,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> UnitPlan | BlockPlan:
    """Plans as `plan`.

    `progress` is called with how many batches have been scored, and how many there are; if `greedy`, how many blocks of a stack
    are chosen.
    """
    subject = find_transformer(model)
    if importance is not None and scores is None:
        check_has_gradients(subject, importance)
    if amount.blocks is None:
        if greedy:
            raise ValueError("greedy=True: only blocks are removed one at a time")
        check_kinds(subject, amount.kinds)
        return plan_from_search(RatioSearch(subject, amount), importance, batches, scores, loss, comm, progress)
    importance = importance or BlockInfluence()
    stacks, numbers = count_blocks(subject, amount)
    if not greedy or scores is not None:
        if scores is None:
            scores = score_units(subject, stacks, importance, batches, loss, amount.normalize, comm=comm, progress=progress)
        blocks = choose_units(stacks, scores, amount, amount.ratios)
        return tried_blocks(subject, find_block_plan(subject, blocks, scores))
    blocks = {name: [] for name in numbers}
    runs = list(read_batches(batches, subject))  # an iterator would be empty in the second round
    while left := [name for name, number in numbers.items() if len(blocks[name]) < number]:
        with mask(subject, blocks, "block"):
            without = score_units(subject, stacks, importance, runs, loss, comm=comm)
        for name in left:
            order = rank_units(stacks[name], without[name], (amount.first, amount.last))
            blocks[name].append(next(number for number in order if number not in blocks[name]))
        if progress is not None:
            progress(max(map(len, blocks.values())), max(numbers.values()))
    return tried_blocks(subject, find_block_plan(subject, blocks))


def plan_from_search(
    search: RatioSearch,
    importance: Importance | None = None,
    batches: Batches | None = None,
    scores: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> UnitPlan:
    """Plans units as `plan_amount`, in what a search has found of a model that is as it was then."""
    search.check()
    if scores is None:
        units, amount = search.removable(), search.amount
        importance = importance or default_importance(units)
        scores = score_units(search.model, units, importance, batches, loss, amount.normalize, amount.per, comm, progress)
    cut = search.cut(scores)
    return UnitPlan.of(cut, search.costs(cut), search.row_lengths(scores, cut))


def plan_units(
    model: nn.Module, units: Chosen, kind: UnitKind | Iterable[UnitKind] = "head", per: Per = "head"
) -> UnitPlan | BlockPlan:
    """Plans the removal of given units: rows that make them, columns that read them, biases, norms, adapters, routers.

    A KV head is removed with the last of its query heads.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: The units that are removed, by place: its name, or its number in the order in which `find_units` gives places; or
            the numbers alone, if there is one place, as of blocks.
        kind: The kind of the units, or several; `"block"` alone.
        per: For heads, whether the numbers are of query heads, or of KV heads with the query heads that they serve.

    Raises:
        ValueError: If there is no such place or unit, a place would be left without units, KV heads would serve different
            numbers of query heads, layers that share a position bias would lose different heads, the config cannot say which
            blocks are left, or the units may not be removed at all; the message says why and what is legal.

    Example:
        >>> import billhook as bh
        >>> print(bh.pruning.plan_units(bh.load("tiny"), [1], "block"))
        LlamaForCausalLM: 2,754,816 -> 2,197,248 parameters (20.2% fewer)
          model.layers  4 -> 3 blocks; without 1
    """
    check_types(plan_units, locals())
    subject, kinds = find_transformer(model), kinds_of(kind)
    if kinds == ["block"]:
        return tried_blocks(subject, find_block_plan(subject, unit_ids(find_units(subject, kinds), units)))
    if "block" in kinds:
        raise ValueError(f"kind={kind!r}: blocks are planned alone")
    check_kinds(subject, kinds)
    structure = trace(subject)
    layers = units_of(subject, structure, kinds)
    check_any(subject, structure, layers, kinds)
    cut = find_cut(subject, structure, layers, units, per)
    try_removal(subject, cut)
    return UnitPlan.of(cut)


def prune_units(
    model: nn.Module,
    units: Chosen,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    kind: UnitKind | Iterable[UnitKind] = "head",
    per: Per = "head",
) -> UnitPlan | BlockPlan:
    """Removes given units from a model in place: it computes what it did with these units masked, and is smaller.

    Where the config of the model's class, or of a family that computes the same, can say the new shape, plain `from_pretrained`
    loads what `bh.save` writes; otherwise the config says the shape in an entry of its own, and `bh.load` loads it.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: The units that are removed, by place: its name, or its number in the order in which `find_units` gives places; or
            the numbers alone, if there is one place, as of blocks.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        kind: The kind of the units, or several; `"block"` alone.
        per: For heads, whether the numbers are of query heads, or of KV heads with the query heads that they serve.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_units`, or if the model's code does not follow; then nothing has changed.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.pruning.prune_units(model, {0: [0, 1]})
        >>> model.num_parameters() == plan.parameters[1]
        True
    """
    check_types(prune_units, locals())
    trained_by = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    check_replaceable(model, trained_by)
    unit_plan = plan_units(model, units, kind, per)
    apply_plan(model, unit_plan, trained_by)
    return unit_plan


def count_blocks(model: nn.Module, amount: Amount) -> tuple[dict[str, Units], dict[str, int]]:
    """Returns the stacks of blocks, and how many an amount removes from each; refuses so many, whatever the scores."""
    stacks = find_units(model, "block")
    flat = {name: torch.zeros(stack.count()) for name, stack in stacks.items()}
    return stacks, {name: len(blocks) for name, blocks in choose_units(stacks, flat, amount, amount.ratios).items()}


def default_importance(units: Mapping[str, Units]) -> Importance:
    """Returns `OutputNorm()`, or `Taylor()` where no module reads some of the units alone, as experts.

    docs/evidence/equal_size.md compares them at equal size, on a real model.
    """
    return OutputNorm() if all(layer.readers for layer in units.values()) else Taylor()
