"""The distance between outputs of a model with old and with new parameters."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from billhook.engine import (
    Comm,
    LazyTensors,
    Run,
    SideBySide,
    evaluating_without_grad,
    in_block_order,
    overridden,
    replaced,
    store_of,
    tree_leaves,
)
from billhook.linalg import float64_device, in_float64
from billhook.model import RopeParameters, rotating_with

ROWS = 256
"""Number of predictions to compare at a time, as float64 takes memory."""


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
        a = a[tokens]
        b = b[tokens]
    if has_logits and a.dim() > 1 and a.shape[-1] > 1:
        a = a.flatten(0, -2)
        b = b.flatten(0, -2)
        return sum(map(_divergence, a.split(ROWS), b.split(ROWS))) / len(a)
    a = in_float64(a)
    b = in_float64(b)
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
def distances(model: nn.Module, news: Sequence[EqualHeads], runs: Sequence[Run], comm: Comm, linear: str) -> list[float]:
    """Returns the mean distance of outputs to the unchanged model's, for sets of parameters.

    All runs pass a block before the next one, so blocks on demand are loaded once.

    Args:
        model: The model, which stays unchanged.
        news: The sets of parameters.
        runs: The batches.
        comm: The ranks, each with its own batches.
        linear: Linear layer whose non-padding tokens are compared.
    """
    news = [EqualHeads(LazyTensors({})), *news]  # the first run of a batch has the model's own parameters
    totals = [0.0] * len(news)
    outputs = dict[int, list[Any]]()
    visits = []
    for run in runs:
        for new in news:
            visits += [turning.visit for turning in rotating_with(model, new.rope, [run])]

    def visit(number: int) -> None:
        result = visits[number]()
        batch, index = divmod(number, len(news))
        outputs.setdefault(number, [result])  # if the run does not call the model
        if index:  # runs end in order
            between = partial(distance_between, tokens=runs[batch].tokens.get(linear))
            totals[index] += fmean(between(*pair) for pair in zip(outputs[number - index], outputs.pop(number), strict=True))
        if index == len(news) - 1:  # the last run of the batch: its logits are released
            del outputs[number - index]

    with evaluating_without_grad(model), in_block_order(model, visits, comm) as on_demand, ExitStack() as stack:
        owner = store_of(model).owner if on_demand else {}
        values = {}

        def enter(block: nn.Module | None) -> None:
            """Reads the new values of a block on all ranks, and drops the previous block's."""
            for index, new in enumerate(news):
                for name in new.values.modules:
                    block_of_values = owner.get(model.get_submodule(name))
                    if block_of_values is block:
                        values[index, name] = new.values.of_module(name)
                    elif block_of_values is not None:
                        values.pop((index, name), None)

        def changed(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            index = together.run % len(news)
            if name not in news[index].values.modules:
                return forward(*args, **kwargs)
            of_module = values.get((index, name)) or news[index].values.of_module(name)  # of a block that is called again
            with replaced({model.get_submodule(name): of_module}):
                return forward(*args, **kwargs)

        together = SideBySide(model, None, comm, enter)
        stack.callback(
            model.register_forward_hook(lambda _module, _args, output: outputs.setdefault(together.run, []).append(output)).remove
        )
        for name in dict.fromkeys(name for new in news for name in new.values.modules):
            module = model.get_submodule(name)
            stack.enter_context(overridden(module, forward=partial(changed, name, module.forward)))
        enter(None)  # outside of blocks, or of a model whose blocks are all in memory
        together([partial(visit, number) for number in range(len(visits))])
    sums = comm(torch.tensor([*totals, len(runs)], dtype=torch.float64, device=float64_device(comm.device)))
    return (sums[1:-1] / sums[-1]).tolist()
