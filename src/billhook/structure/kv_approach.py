"""The heads of a group become equal step by step, while the model trains, so that to pool them then loses nothing."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.structure.kv_ready import Grouping, Pair, Way, attentions_of
from billhook.structure.kv_start import Start
from billhook.structure.pooling import How, Pooled
from billhook.structure.surgery import fresh, undone_by_errors, values_kept
from billhook.walk import Reduce


@torch.no_grad()
def approach(model: nn.Module, parameters: Mapping[str, Pooled], share: float, how: How = "mean") -> None:
    """Moves every head towards what its group is pooled to, in place: W <- W + share (pool(W) - W).

    With shares 1/n, 1/(n - 1), ..., 1 the heads of a group are equal after n moves, whatever training does in between: each goes
    an equal part of the way that is then left. Optimizer state stays. If anything fails, nothing has moved.

    Args:
        model: A Hugging Face model.
        parameters: Which parameters hold heads, and how they are pooled, as in a `KVHeadPlan`.
        share: The part of the way, in (0, 1].
        how: To the mean of a group, or to its first head.
    """
    moving = {model.get_parameter(name): pooled for name, pooled in parameters.items()}
    with values_kept(moving):
        for parameter, pooled in moving.items():
            parameter.lerp_(pooled.spread(pooled.pool(parameter, how)), share)


def turned_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    way: Way,
    pairs: Iterable[Pair] = (),
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """By parameter, the values with which the heads of each group lie in one basis and beside each other.

    Nothing is pooled, and the model computes what it did.

    Args:
        model: A Hugging Face model; it stays as it is.
        groups: How many KV heads each attention is to have, by the attention's name.
        way: How heads become equal.
        pairs: Batches, each with its loss (None for the model's own); without any the weights alone tell which basis.
        reduce: Sums over ranks.

    Raises:
        ValueError: If the way does not suit the model.
    """
    attentions = attentions_of(model, groups)
    attentions.check(way)
    trials = [attentions.trial(*pair) for pair in pairs]
    new = attentions.equal(way, attentions.moments(trials, way.grouping, reduce), pool=False)
    return {f"{linear}.{name}": value for linear, own in new.items() for name, value in own.items()}


def check_ready(model: nn.Module, groups: Mapping[str, int], start: Start | None, grouping: Grouping) -> None:
    """Refuses a model whose heads cannot be made ready for fewer.

    Args:
        model: A Hugging Face model.
        groups: How many KV heads each attention is to have, by the attention's name.
        start: How a group is rendered; None if that is yet to be chosen among all that suit the model.
        grouping: Which heads share a group.

    Raises:
        ValueError: If its heads are not made by one linear each, or neither turned nor put in another order.
    """
    attentions = attentions_of(model, groups)
    if start is not None:
        attentions.check(Way(start, grouping))


@torch.no_grad()
def take(model: nn.Module, weights: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Takes other values of the same sizes, in place; of what differs optimizer state starts anew.

    Args:
        model: A Hugging Face model.
        weights: By parameter.
        optimizers: Those that train the model.

    If anything fails, nothing has changed.

    Raises:
        ValueError: If values are not finite.
    """
    trained_by = list(optimizers)
    for name, values in weights.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: the new values are not finite")
    new = {model.get_parameter(name): weights[name] for name in changed(model, weights)}
    with undone_by_errors(model, trained_by), values_kept(new):
        for parameter, values in new.items():
            parameter.copy_(values)
            for optimizer in trained_by:
                if optimizer.state.pop(parameter, None) is not None and (first := fresh(optimizer, parameter)):
                    optimizer.state[parameter] = first


def changed(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The parameters that are to have other values than they have."""
    return [name for name, values in weights.items() if not torch.equal(model.get_parameter(name), values)]
