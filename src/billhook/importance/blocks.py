"""How much each block of a model matters: by what it changes of the hidden states, or by the loss without it."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from billhook.importance.score import Reduce, trial_of
from billhook.model.find import find_transformer
from billhook.running.batches import Loss, Run, tokens_of
from billhook.running.undisturbed import resting
from billhook.units.blocks import Chosen, check_blocks, find_blocks, hidden_states, returned_states, skipping

Scores = dict[str, Tensor]

By = Literal["influence", "loss"]
"""What makes a block important."""
Stacks = Mapping[str, nn.ModuleList]


def block_importance(
    model: nn.Module,
    batches: Iterable[Any],
    by: By = "influence",
    without: Chosen = (),
    loss: Loss | None = None,
) -> Scores:
    """How much each block matters; the model is as before afterwards, modes and random numbers too.

    `"influence"` (ShortGPT, 2403.03853, eq. 1): BI_i = 1 - E[h_i . h_(i+1) / (|h_i| |h_(i+1)|)], the mean over all tokens that
    count, where h_i is what block i takes and h_(i+1) what it gives. `"loss"`: the mean of the batches' losses when the block is
    skipped, one forward a block and batch.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        batches: What the model's forward takes, as dictionaries, labels included; a causal language model's own inputs are its
            labels where there are none. Padding (by `attention_mask`) does not count.
        by: `"influence"` or `"loss"`.
        without: Blocks that are skipped all the time, as those that have been chosen before; their importance is infinite.
        loss: What of a batch is to be small; by default the loss that the model gives.

    Returns:
        By stack: float64, `[blocks]`, on the CPU.

    Raises:
        ValueError: If `by` is not legal, there are no blocks or no batches, a batch gives no loss, or a score is not finite.
    """
    check_by(by)
    subject = find_transformer(model)
    stacks = find_blocks(subject)
    trials = [block_trial(subject, stacks, batch, loss) for batch in batches]
    gone = check_blocks(stacks, without) if isinstance(without, Mapping) or list(without) else {}
    with resting(subject), torch.no_grad():
        return score_blocks(stacks, trials, by, gone)


def score_blocks(
    stacks: Stacks, trials: list[Run], by: By, gone: Mapping[str, list[int]], reduce: Reduce | None = None
) -> Scores:
    """What `block_importance` does, of stacks that have been found and batches that are ready.

    Args:
        stacks: What `find_blocks` found.
        trials: What `block_trial` makes of batches.
        by: `"influence"` or `"loss"`.
        gone: Blocks that are skipped.
        reduce: Sums over ranks, where each has trials of its own.

    Raises:
        ValueError: If there are no trials, or a score is not finite.
    """
    with skipping(stacks, gone):
        sums = _influences(stacks, trials) if by == "influence" else _losses(stacks, trials, gone)
    packed = torch.cat(list(sums.values()), dim=1)  # sums, and how many were summed
    packed = packed if reduce is None else reduce(packed)
    scores: Scores = {}
    for name, (total, number) in zip(stacks, torch.split(packed, [len(stack) for stack in stacks.values()], 1), strict=True):
        rest = [place for place in range(len(total)) if place not in gone.get(name, ())]
        if not (number[rest] > 0).all():
            raise ValueError(f"batches: not one token reaches the blocks of {name}; at least one batch is needed")
        scores[name] = torch.full_like(total, torch.inf)
        scores[name][rest] = 1 - (total / number)[rest] if by == "influence" else (total / number)[rest]
        if not scores[name][rest].isfinite().all():
            raise ValueError(f"importance: a score of {name} is NaN or infinite: the model is not finite on a batch")
    return scores


def block_trial(model: nn.Module, stacks: Stacks, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """A batch, on the model's device: its loss, and for each stack which tokens count where the batch says so."""
    return replace(trial_of(model, {}, batch, loss), tokens=tokens_of(model, stacks, batch))


def check_by(by: str) -> None:
    """Refuses an unknown kind of importance.

    Raises:
        ValueError: If it is one.
    """
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")


def sizes_of(stacks: Stacks) -> dict[str, int]:
    """How many blocks each stack has."""
    return {name: len(stack) for name, stack in stacks.items()}


def _influences(stacks: Stacks, trials: list[Run]) -> Scores:
    """By stack: the sum of cosines over tokens, and the number of tokens; float64, `[2, blocks]`."""
    sums = _nothing(stacks)

    def note(trial: Run, name: str, number: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        given = hidden_states([*args, *kwargs.values()])
        returned = None if given is None else returned_states(given, output)
        if given is not None and returned is not None:
            cosines = cosine_similarity(given.detach().float(), returned.detach().float(), dim=-1).double()
            mask = trial.tokens.get(name)
            if mask is not None and mask.shape == cosines.shape:
                cosines = cosines[mask.to(cosines.device)]
            sums[name][:, number] += torch.tensor([float(cosines.sum()), cosines.numel()], dtype=torch.float64)

    for trial in trials:
        with ExitStack() as hooks:
            for name, stack in stacks.items():
                for number, block in enumerate(stack):
                    hook = partial(note, trial, name, number)
                    hooks.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            trial.forward()
    return sums


def _losses(stacks: Stacks, trials: list[Run], gone: Mapping[str, list[int]]) -> Scores:
    """By stack: the sum of the batches' losses without each block, and the number of batches; float64, `[2, blocks]`."""
    sums = _nothing(stacks)
    for trial in trials:
        for name, stack in stacks.items():
            for number in range(len(stack)):
                if number not in gone.get(name, ()):
                    with skipping(stacks, {name: [number]}):
                        sums[name][:, number] += torch.tensor([float(trial.forward()), 1], dtype=torch.float64)
    return sums


def _nothing(stacks: Stacks) -> Scores:
    return {name: torch.zeros(2, len(stack), dtype=torch.float64) for name, stack in stacks.items()}
