"""Which KV heads share a group: those that one head renders with the least loss."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.kv_heads.bases.bases import find_bases
from billhook.kv_heads.bases.freedom import Freedoms, in_order
from billhook.kv_heads.bases.moments import Moments
from billhook.kv_heads.bases.stacks import Stacks
from billhook.kv_heads.methods.base import Rendered

RESTARTS = 20


def similar_order(stacks: Stacks, moments: Moments, freedoms: Freedoms, method: Rendered, groups: int) -> list[int]:
    """Returns an order of the KV heads in which those that share a group are next to each other, from moments of one group.

    The loss of a group is estimated as the sum of the losses of its pairs, of keys and of values, each as a share of what there
    is. Heads are exchanged between groups as long as that helps, from the present order and from random ones.
    """
    count = len(stacks.k)
    loss = torch.zeros(count, count, dtype=torch.float64)
    for pair in itertools.combinations(range(count), 2):
        found = find_bases(in_order(stacks, pair), moments_in_order(moments, pair, 1), freedoms, method)
        loss[pair] = loss[pair[::-1]] = sum(one.lost for one in found)
    generator, own = torch.Generator().manual_seed(0), torch.arange(count) // (count // groups)
    starts = [own, *(own[torch.randperm(count, generator=generator)] for _ in range(RESTARTS))]
    ends = [_improved(group, loss) for group in starts]
    best = ends[int(torch.stack([_loss(group, loss) for group in ends]).round(decimals=9).argmin())].tolist()
    return sorted(range(count), key=lambda head: (best.index(best[head]), head))


def moments_in_order(moments: Moments, order: Sequence[int], groups: int) -> Moments:
    """Returns the moments of one group of all heads as those of heads in another order and in several groups.

    Of keys and queries these are what `gather` would find of the model in that order. Values are still seen as all query heads of
    the attention attend to them, not only those of their group.
    """
    own = torch.tensor(order).reshape(groups, -1)

    def taken(one: Tensor) -> Tensor:
        return torch.stack([one[0][heads][:, :, heads] for heads in own])

    return Moments(taken(moments.keys), taken(moments.values), moments.queries[own.flatten()])


def _loss(group: Tensor, loss: Tensor) -> Tensor:
    return torch.where(group[:, None] == group, loss, 0).sum()


def _improved(group: Tensor, loss: Tensor) -> Tensor:
    """Exchanges the two heads whose exchange helps most, until none does; `group` says which each head is in.

    The exchange of a, in group g, with b, in group h, changes the sum over pairs by l(a, h) + l(b, g) - l(a, g) - l(b, h) -
    2 l(a, b), l(a, h) being the loss of a with all of h.
    """
    group = group.clone()
    while True:
        near = loss @ torch.nn.functional.one_hot(group).to(loss)  # of each head with each group
        there = near[:, group]  # of each head with the group of each other
        change = there + there.T - there.diagonal()[:, None] - there.diagonal() - 2 * loss
        change[group[:, None] == group] = 0
        first, second = divmod(int(change.argmin()), len(group))
        if change[first, second] > -1e-12:
            return group
        group[[first, second]] = group[[second, first]]
