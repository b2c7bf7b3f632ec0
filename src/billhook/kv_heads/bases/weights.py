"""New values of parameters with which heads are ready to be pooled, of a model in memory or one whose blocks ranks share."""

from collections.abc import Iterable, Mapping

from torch import nn

from billhook.engine.walk import Reduce
from billhook.kv_heads.bases.ready import BatchAndLoss, made_equal
from billhook.kv_heads.bases.shared import attentions_of
from billhook.kv_heads.methods.base import KVMethod, Rendered
from billhook.model.plan import Weights
from billhook.repairs.repair import Repair


def ready_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    method: KVMethod,
    batches: Iterable[BatchAndLoss] = (),
    repair: Repair | None = None,
    reduce: Reduce | None = None,
) -> tuple[Weights, str]:
    """Returns by parameter the values with which the heads of each group are equal, and how they came to be.

    Args:
        model: A Hugging Face model; it stays as it is.
        groups: How many KV heads each attention is to have, by the attention's name; others stay as they are.
        method: How heads become equal; of several `candidates` the best on held-out batches.
        batches: Batches, each with its loss (None for the model's own).
        repair: If given, what reads the heads, and the feed-forwards, are refitted to what the whole model gives.
        reduce: Sums over ranks.
    """
    attentions = attentions_of(model, groups, reduce)
    new, how = made_equal(attentions, method, batches, repair)
    return attentions.weights(new), how


def turned_weights(
    model: nn.Module,
    groups: Mapping[str, int],
    method: Rendered,
    batches: Iterable[BatchAndLoss] = (),
    reduce: Reduce | None = None,
) -> Weights:
    """Returns by parameter the values with which the heads of each group lie in one basis and next to each other.

    Nothing is pooled, and the model computes what it did. Without batches the weights alone say which basis.
    """
    attentions = attentions_of(model, groups, reduce)
    attentions.check(method)
    trials = [attentions.trial(*pair) for pair in batches]
    return attentions.weights(attentions.equal(method, attentions.moments(trials, method.grouping), pool=False))
