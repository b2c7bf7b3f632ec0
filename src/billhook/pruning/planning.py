"""Plans pruning: `plan` chooses units by their scores, `plan_units` takes given units."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import SINGLE_PROCESS, Comm, Loss, Reduce, cpu_by_default, store_of
from billhook.importance.activations import OutputNorm
from billhook.importance.blocks import BlockInfluence
from billhook.importance.reap import REAP, RoutingImportance, stacked_experts
from billhook.importance.score import (
    Importance,
    Sums,
    check_supports_streaming,
    rank_channels,
    score_units,
    scores_of,
    sum_units,
)
from billhook.importance.taylor import Taylor
from billhook.linalg import TensorsByName
from billhook.model import apply_plan, check_replaceable, find_transformer, tokenizer_of
from billhook.progress import OnProgress
from billhook.pruning.amount import Amount
from billhook.pruning.block_plan import BlockPlan, checked_block_plan, find_block_plan
from billhook.pruning.choice import choose, rank_units
from billhook.pruning.cut import find_cut
from billhook.pruning.plan import UnitPlan, check_kinds
from billhook.pruning.removal import try_removal
from billhook.pruning.target import RatioSearch
from billhook.tracing.trace import trace
from billhook.units import (
    Chosen,
    Per,
    UnitKind,
    UnitNumbers,
    Units,
    UnitsByModule,
    check_any,
    find_units,
    kinds_of,
    mask,
    of_kind,
    unit_ids,
    units_of,
)
from billhook.vocabulary.scores import token_scores


@cpu_by_default()
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
    tokens: float | None = None,
    params: int | float | None = None,
    amount: Amount | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scores: TensorsByName | None = None,
    greedy: bool = False,
    loss: Loss | None = None,
    reduce: Reduce | None = None,
) -> UnitPlan | BlockPlan:
    """Plans which units to remove, without changing the model.

    References: "LLM-Pruner" (Ma, Fang & Wang, 2023), section 3, https://arxiv.org/abs/2305.11627; for blocks, "ShortGPT" (Men et
    al., 2024), https://arxiv.org/abs/2403.03853.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        importance: Scores the units: any `Importance`. Defaults to `OutputNorm()`; to `REAP()` for experts, and to `Taylor()`
            for experts of a custom class or with other units; to `BlockInfluence()` for blocks.
        batches: Calibration data: dictionaries of forward inputs with labels, or a `Calibration`. A causal language model uses
            its inputs as labels if there are none. Padding (`attention_mask`) is ignored. Defaults to `"mixed"`
            and `"generated"` text.
        heads: Fraction of query heads to remove, in [0, 1), the same number from every KV head.
        kv_heads: Fraction of KV heads to remove, with their query heads.
        channels: Fraction of MLP channels to remove.
        residual: Fraction of hidden dimensions (`hidden_size`) to remove.
        experts: Fraction of experts to remove.
        blocks: Fraction (float) or number (int) of blocks to remove from each stack. Cannot be combined with other units.
        tokens: Fraction of the vocabulary to remove: the tokens that the batches use least.
        params: Budget: maximum number (int) or fraction (float) of parameters, met by removing KV heads and channels.
        amount: An `Amount` instead of the eight arguments above. It also sets other budgets, the ranking, and protected blocks.
        tokenizer: Tokenizer of the batches, for `tokens`. Defaults to the one in the folder of the model.
        scores: Scores of all prunable units, as `score` returns them, instead of `importance` and `batches`.
        greedy: If True, removes one block at a time and rescores the rest. Only for blocks.
        loss: Function of model and batch that returns the loss. Defaults to the loss that the model returns.
        reduce: Sums a tensor over ranks, if each rank has its own batches.

    Returns:
        The plan. `print` shows it with the new costs of the model; `plan.units` has the chosen units by module.

    Raises:
        ValueError: If an argument is not legal, the budget is out of reach (the message says what is reachable), the units are
            not prunable, or they cannot be scored, for example without batches, labels, or a finite gradient.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
        >>> {(plan.before[name], plan.after[name]) for name in plan.units}
        {((384,), (288,))}
    """
    check_types(plan, locals())
    by_name: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads, "channels": channels, "residual": residual, "experts": experts, "blocks": blocks,
        "tokens": tokens, "params": params,
    }  # fmt: skip
    given_names = [name for name, value in by_name.items() if value is not None]
    if amount is not None and given_names:
        raise ValueError(f"amount cannot be combined with {given_names[0]}. Pass {given_names[0]} to Amount instead.")
    amount = amount or Amount(**by_name)
    return plan_amount(model, amount, importance, batches, scores, greedy, loss, Comm.of(reduce, model), tokenizer=tokenizer)


def plan_amount(
    model: nn.Module,
    amount: Amount,
    importance: Importance | None = None,
    batches: Batches | None = None,
    scores: TensorsByName | None = None,
    greedy: bool = False,
    loss: Loss | None = None,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> UnitPlan | BlockPlan:
    """Plans as `plan` does, for an `Amount`.

    `progress` is called with the number of scored batches and the total; if `greedy`, with the number of chosen blocks.
    """
    subject = find_transformer(model)
    if importance is not None and scores is None and not store_of(subject).trains:
        check_supports_streaming(importance)  # before a block is read
    if amount.blocks is None:
        if greedy:
            raise ValueError("greedy=True requires blocks. Set blocks, or remove greedy.")
        check_kinds(subject, amount.kinds)
        return plan_from_search(RatioSearch(subject, amount), importance, batches, scores, loss, comm, progress, tokenizer)
    importance = importance or BlockInfluence()
    stacks, numbers = count_blocks(subject, amount)
    if not greedy or scores is not None:
        if scores is None:
            scores = score_units(subject, stacks, importance, batches, loss, amount.normalize, comm=comm, progress=progress)
        blocks = _lowest_blocks(stacks, scores, amount)
        return checked_block_plan(subject, find_block_plan(subject, blocks, scores))
    blocks = {name: [] for name in numbers}
    runs = list(read_batches(batches, subject))  # an iterator would be empty in the second round
    num_rounds = max(numbers.values(), default=0)
    for num_removed in range(num_rounds):
        with mask(subject, blocks, "block"):
            new_scores = score_units(subject, stacks, importance, runs, loss, comm=comm)
        for name, number in numbers.items():
            if num_removed < number:
                order = rank_units(stacks[name], new_scores[name], (amount.first, amount.last))
                blocks[name].append(next(block for block in order if block not in blocks[name]))
        if progress is not None:
            progress(num_removed + 1, num_rounds)
    return checked_block_plan(subject, find_block_plan(subject, blocks))


def plan_from_search(
    search: RatioSearch,
    importance: Importance | None = None,
    batches: Batches | None = None,
    scores: TensorsByName | None = None,
    loss: Loss | None = None,
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> UnitPlan:
    """Plans units as `plan_amount` does, reusing a search of the unchanged model."""
    search.check()
    sums, orders = Sums({}, {}), {}
    if scores is None:
        model, units, amount, scores = search.model, search.removable(), search.amount, {}
        if tokens := of_kind(units, "token"):
            batches = list(read_batches(batches, model))  # an iterator would be empty afterwards
            scores |= token_scores(model, tokens, batches, tokenizer or tokenizer_of(model), comm)
        if others := {name: layer for name, layer in units.items() if name not in tokens}:
            importance = importance or default_importance(model, others)
            sums = sum_units(model, others, importance, batches, loss, amount.per, comm, progress)
            orders = rank_channels(sums, comm)
            scores |= scores_of(importance, sums, amount.normalize, comm)
    cut = search.cut(scores, orders)
    changes = importance.changes(sums.routing, cut.units, comm) if isinstance(importance, RoutingImportance) else ()
    return UnitPlan.of(cut, search.costs(cut), search.width_notes(scores, cut), tuple(changes))


@cpu_by_default()
def plan_units(
    model: nn.Module, units: Chosen, kind: UnitKind | Iterable[UnitKind] = "head", per: Per = "head"
) -> UnitPlan | BlockPlan:
    """Plans the removal of given units, with their rows, columns, biases, norms, and adapters.

    A KV head is removed with its last query head.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: Units to remove, by module: its name, or its number in the order of `find_units`. If there is only one module, such
            as for blocks, the numbers alone.
        kind: Kind of the units, or several kinds. `"block"` cannot be combined with others.
        per: Whether numbers are query heads (`"head"`), or KV heads with their query heads (`"kv_head"`).

    Raises:
        ValueError: If there is no such module or unit, or the units are not prunable. The message says why and what is legal.

    Example:
        >>> import billhook as bh
        >>> print(bh.pruning.plan_units(bh.load("tiny"), [1], "block"))
        LlamaForCausalLM: 2,754,816 -> 2,197,248 parameters (20.2% fewer)
          model.layers  4 -> 3 blocks; without 1
    """
    check_types(plan_units, locals())
    subject, kinds = find_transformer(model), kinds_of(kind)
    if kinds == ["block"]:
        return checked_block_plan(subject, find_block_plan(subject, unit_ids(find_units(subject, kinds), units)))
    if "block" in kinds:
        raise ValueError(f"kind={kind!r}: blocks cannot be combined with other kinds. Plan them separately.")
    check_kinds(subject, kinds)
    structure = trace(subject)
    layers = units_of(subject, structure, kinds)
    check_any(subject, structure, layers, kinds)
    cut = find_cut(subject, structure, layers, units, per)
    try_removal(subject, cut)
    return UnitPlan.of(cut)


@cpu_by_default()
def prune_units(
    model: nn.Module,
    units: Chosen,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    kind: UnitKind | Iterable[UnitKind] = "head",
    per: Per = "head",
) -> UnitPlan | BlockPlan:
    """Removes given units in place, so that the model computes the same as with them masked.

    If the config of this or an equivalent architecture can express the new shape, `bh.save` writes a standard checkpoint.
    Otherwise it writes a billhook checkpoint for `bh.load`.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: Units to remove, by module: its name, or its number in the order of `find_units`. If there is only one module, such
            as for blocks, the numbers alone.
        optimizers: Optimizer or optimizers of the model; their state is remapped.
        kind: Kind of the units, or several kinds. `"block"` cannot be combined with others.
        per: Whether numbers are query heads (`"head"`), or KV heads with their query heads (`"kv_head"`).

    Returns:
        The plan that was applied.

    Raises:
        ValueError: As `plan_units`, or if the model's code does not work with the smaller tensors. Nothing changes then.

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
    """Returns the stacks and the number of blocks to remove from each, or raises if too many."""
    stacks = find_units(model, "block")
    equal_scores = {name: torch.zeros(stack.count()) for name, stack in stacks.items()}
    return stacks, {name: len(blocks) for name, blocks in _lowest_blocks(stacks, equal_scores, amount).items()}


def _lowest_blocks(stacks: UnitsByModule, scores: TensorsByName, amount: Amount) -> UnitNumbers:
    ends, ratio = (amount.first, amount.last), amount.blocks or 0
    return choose(stacks, scores, ratio, amount.ranking, amount.min_units, ends=ends, name="blocks")


def default_importance(model: nn.Module, units: UnitsByModule) -> Importance:
    """Returns `REAP()` for experts that it can observe, `OutputNorm()`, or `Taylor()`.

    See docs/evidence/equal_size.md for a comparison.
    """
    if all(stacked_experts(model, layer) for layer in units.values()):
        return REAP()
    return OutputNorm() if all(layer.readers for layer in units.values()) else Taylor()
