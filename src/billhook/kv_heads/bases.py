"""Weights of an attention with which the KV heads of a group are equal, in the sizes that the model has."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kv_heads.freedom import Block, Freedom, Freedoms, in_order
from billhook.kv_heads.methods import Rendered
from billhook.kv_heads.moments import Moments
from billhook.kv_heads.stacks import Stacks


@dataclass(frozen=True, eq=False)
class Bases:
    """How one head renders each group, in real numbers: B_j times its group's sum of P_i k_i stands for head j.

    Attributes:
        basis: B, `[heads, width, width]`, float64.
        shared: P, `[heads, width, width]`, float64.
        groups: How many groups there are.
        lost: The share of what the heads give that is lost, in the metric of what reads them: the sums over all heads of
            E||S_j (k_j - B_j kbar)||^2 and of E||S_j k_j||^2, the one divided by the other.
    """

    basis: Tensor
    shared: Tensor
    groups: int
    lost: float


def weight_moments(stacks: Stacks, groups: int) -> Moments:
    """Returns moments without data, as if all that the projections are given were independent and of one size."""

    def crossed(stack: Tensor) -> Tensor:
        grouped = _in_groups(stack, groups)
        return torch.einsum("gian,gjbn->giajb", grouped, grouped)

    queries = _in_groups(stacks.q, len(stacks.k))
    return Moments(crossed(stacks.k), crossed(stacks.v), torch.einsum("jhan,jhbn->jab", queries, queries))


def find_bases(stacks: Stacks, moments: Moments, freedoms: Freedoms, method: Rendered) -> tuple[Bases, Bases]:
    """Finds the renderings of the keys and of the values of an attention; numbers that may not be mixed are averaged."""
    outputs = _in_groups(stacks.o, len(stacks.k))
    readers = torch.einsum("jhoa,jhob->jab", outputs, outputs)
    return _bases(moments.queries, moments.keys, freedoms.keys, method), _bases(readers, moments.values, freedoms.values, method)


def pooled(stacks: Stacks, keys: Bases, values: Bases) -> Stacks:
    """Returns the weights with each head replaced by its group's rendering: k' = sum of P_i k_i, v' likewise."""

    def shared(stack: Tensor, own: Bases) -> Tensor:
        summed = _in_groups(own.shared @ stack, own.groups).sum(1)
        return summed.repeat_interleave(len(stack) // own.groups, 0)

    return _taken(stacks, keys, values, shared(stacks.k, keys), shared(stacks.v, values))


def turned(stacks: Stacks, keys: Bases, values: Bases) -> Stacks:
    """Returns the weights with each head in its group's basis and none pooled; the model computes what it did: k' = B_j^-1 k.

    Raises:
        torch.linalg.LinAlgError: If a basis has no inverse, as that of a head without any part in what its group shares may not.
    """
    return _taken(stacks, keys, values, torch.linalg.solve(keys.basis, stacks.k), torch.linalg.solve(values.basis, stacks.v))


def _taken(stacks: Stacks, keys: Bases, values: Bases, k: Tensor, v: Tensor) -> Stacks:
    """Returns new keys and values, and what reads them: q' = B_j^T q, W_O' = W_O B_j."""
    queries = len(stacks.q) // len(stacks.k)
    q = keys.basis.mT.repeat_interleave(queries, 0) @ stacks.q
    return Stacks(q, k, v, stacks.o @ values.basis.repeat_interleave(queries, 0))


def _bases(metric: Tensor, moments: Tensor, freedom: Freedom, method: Rendered) -> Bases:
    groups, size, width = moments.shape[:3]
    metrics, found, lost, whole = _in_groups(metric, groups), [], 0.0, 0.0
    for group in range(groups):
        basis, shared = (torch.eye(width, dtype=torch.float64, device=metric.device).repeat(size, 1, 1) for _ in range(2))
        shared /= size
        for block in freedom:
            one = method.render(*_of_block(metrics[group], moments[group], block))
            block.put(basis, one.basis)
            block.put(shared, one.shared)
        found.append((basis, shared))
        missing, there = _loss(metrics[group], moments[group], basis, shared)
        lost, whole = lost + missing, whole + there
    basis, shared = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Bases(basis, shared, groups, lost / whole if whole else 0.0)


def _loss(metric: Tensor, moments: Tensor, basis: Tensor, shared: Tensor) -> tuple[float, float]:
    """Returns the sum over heads of E||S_j (k_j - B_j kbar)||^2, and of E||S_j k_j||^2."""
    crossed = torch.einsum("iab,ibjc->jac", shared, moments)  # E[kbar k_j^T]
    own = torch.einsum("jac,jbc->ab", crossed, shared)
    heads = torch.einsum("jajb->jab", moments)
    through = basis @ crossed
    error = heads - through - through.mT + basis @ own @ basis.mT
    missing, there = (float((metric * one).sum()) for one in (error, heads))
    return missing, there


def _of_block(metric: Tensor, moments: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Returns a block's part of a metric and of moments; pairs as complex numbers: E[z_i conj(z_j)]."""
    r, i = list(block.real), list(block.imaginary)
    if not i:
        return metric[:, r][:, :, r], moments[:, r][:, :, :, r]
    square = metric[:, r, r] + metric[:, i, i]
    real = moments[:, r][:, :, :, r] + moments[:, i][:, :, :, i]
    imaginary = moments[:, i][:, :, :, r] - moments[:, r][:, :, :, i]
    return torch.complex(square, torch.zeros_like(square))[:, :, None], torch.complex(real, imaginary)


def _in_groups(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, -1, *tensor.shape[1:])


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
    best = ends[int(torch.stack([_loss_of_order(group, loss) for group in ends]).round(decimals=9).argmin())].tolist()
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


def _loss_of_order(group: Tensor, loss: Tensor) -> Tensor:
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
