"""The distance between outputs of a model with old and with new parameters."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from billhook.engine.batches import Run
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.lazy import LazyTensors
from billhook.engine.passes import SideBySide
from billhook.engine.state import evaluating_without_grad, overridden, replaced
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.linalg import float64_device, in_float64
from billhook.model.rotary import RopeParameters, rotating_with

ROWS = 256
"""Number of predictions to compare at a time, as float64 takes memory."""

Compare = Callable[[Run, int, list[Any], list[Any]], None]
"""Compares the outputs of a run before and after a change, of this number."""


@dataclass(frozen=True)
class EqualHeads:
    """Parameters with equal heads in each group.

    Attributes:
        values: New values by parameter name, in the sizes of the model.
        rope: Rotary parameters that the model then needs. None if they stay.
        how: What happens to the rotary frequencies, in words.
    """

    values: LazyTensors
    rope: RopeParameters | None = None
    how: str = ""


def distance_between(expected: Any, other: Any, tokens: Tensor | None = None) -> float:  # noqa: ANN401 - whatever a model returns
    """Returns the mean KL(expected || other), or without logits a relative square error.

    Args:
        expected: Output of the unchanged model.
        other: Output with other weights.
        tokens: Mask of non-padding tokens, bool, `[batch, length]`, for outputs of this shape.
    """
    has_logits = isinstance(getattr(expected, "logits", None), Tensor)
    a, b = ((output.logits if has_logits else _states(output)).detach() for output in (expected, other))
    if tokens is not None and tokens.shape == a.shape[:2]:
        a, b = a[tokens], b[tokens]
    if has_logits and a.dim() > 1 and a.shape[-1] > 1:
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        return sum(map(_divergence, a.split(ROWS), b.split(ROWS))) / len(a)
    a, b = in_float64(a), in_float64(b)
    return float((a - b).square().mean() / a.square().mean().clamp_min(torch.finfo(torch.double).tiny))


def _divergence(expected: Tensor, other: Tensor) -> float:
    p, q = (log_softmax(in_float64(logits), -1) for logits in (expected, other))
    return float(torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum())


def _states(output: Any) -> Tensor:  # noqa: ANN401
    """Returns the first hidden states in an output, or else its first floating-point tensor."""
    numbers = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not numbers:
        raise ValueError(
            f"batches: the model returns a {type(output).__name__}, which contains no floating-point tensor to compare"
        )
    return next((tensor for tensor in numbers if tensor.dim() > 1), numbers[0])


@torch.no_grad()
def distances(
    model: nn.Module, news: Sequence[EqualHeads], trials: Sequence[Run], comm: Comm = SINGLE_PROCESS, linear: str = ""
) -> list[float]:
    """Returns the mean distance of outputs to the unchanged model's, for sets of parameters.

    Blocks of a streamed model are read once.

    Args:
        model: The model, which stays unchanged.
        news: The sets of parameters.
        trials: The batches.
        comm: The ranks, each with its own batches.
        linear: Linear layer whose non-padding tokens are compared.
    """
    totals = [0.0] * len(news)

    def compare(trial: Run, number: int, expected: list[Any], other: list[Any]) -> None:
        between = partial(distance_between, tokens=trial.tokens.get(linear))
        totals[number] += fmean(between(*pair) for pair in zip(expected, other, strict=True))

    if store_of(model).in_files:
        _compare_side_by_side(model, news, trials, compare)
    else:
        _compare(model, news, trials, compare, comm)
    device = float64_device(comm.device)
    sums = comm(torch.tensor([*totals, len(trials)], dtype=torch.float64, device=device))
    return (sums[:-1] / sums[-1]).tolist()


def _compare(model: nn.Module, news: Sequence[EqualHeads], trials: Sequence[Run], compare: Compare, comm: Comm) -> None:
    """Runs each batch before and after each change, until no rank has a run left."""
    store = store_of(model)
    for number in count():
        trial = trials[number : number + 1]
        if not comm(torch.tensor([float(len(trial))], device=comm.device)).any():
            return
        outputs = []
        for index, new in enumerate([EqualHeads(LazyTensors({})), *news]):
            with store.computing_with(new.values), store.independently(comm):
                outputs += [_outputs(model, turning) for turning in rotating_with(model, new.rope, trial)]
            if trial and index:
                compare(trial[0], index - 1, outputs[0], outputs.pop())


def _outputs(model: nn.Module, trial: Run) -> list[Any]:
    """Returns the outputs of each call of the model, or else the output of the run."""
    outputs = []
    with evaluating_without_grad(model), ExitStack() as stack:
        stack.callback(model.register_forward_hook(lambda _module, _args, output: outputs.append(output)).remove)
        result = trial.visit()
    return outputs or [result]


def _compare_side_by_side(model: nn.Module, news: Sequence[EqualHeads], trials: Sequence[Run], compare: Compare) -> None:
    """Does the same for a streamed model, with a single read of its blocks."""
    of_block, expected = dict[tuple[int, str], dict[str, Tensor]](), dict[int, Any]()
    together = SideBySide(model, lambda _: of_block.clear())  # new parameters of the block that computes

    def changed(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        index = together.run % (1 + len(news)) - 1
        if index < 0 or name not in news[index].values.modules:  # the first of these runs has the model's own parameters
            return forward(*args, **kwargs)
        if (index, name) not in of_block:
            of_block[index, name] = news[index].values.of_module(name)
        with replaced({model.get_submodule(name): of_block[index, name]}):
            return forward(*args, **kwargs)

    def run(number: int, index: int, turning: Run) -> None:
        output = turning.visit()
        if index < 0:
            expected[number] = output
        else:  # runs end in order
            compare(trials[number], index, [expected[number]], [output])
        if index == len(news) - 1:  # the last run of the batch: its logits are released
            del expected[number]

    visits = []
    for number, trial in enumerate(trials):
        visits.append(partial(run, number, -1, trial))
        for index, new in enumerate(news):
            visits += [partial(run, number, index, turning) for turning in rotating_with(model, new.rope, [trial])]
    with evaluating_without_grad(model), ExitStack() as stack:
        for name in dict.fromkeys(name for new in news for name in new.values.modules):
            linear = model.get_submodule(name)
            stack.enter_context(overridden(linear, forward=partial(changed, name, linear.forward)))
        together(visits)
