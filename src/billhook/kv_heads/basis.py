"""Bases in which a single head represents a group, and the grouping that loses least."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kv_heads.frequencies import Slots
from billhook.kv_heads.layout import HeadTensors
from billhook.kv_heads.methods import SVD, Reconstructing, Reconstruction
from billhook.kv_heads.moments import Moments, grouped
from billhook.kv_heads.symmetry import Mixing, Symmetries

RESTARTS = 20
"""Number of random groupings to improve, besides the current one."""


@dataclass(frozen=True, eq=False)
class Bases(Reconstruction):
    """Reconstruction of each group from a single head, in real numbers.

    B_j times the group's sum of P_i k_i replaces head j.

    Attributes:
        basis: B, `[heads, width, width]`, float64.
        shared: P, `[heads, width, width]`, float64.
        groups: Number of groups.
        lost: Relative loss in the metric of the consumers: the sum over heads of E||S_j (k_j - B_j kbar)||^2 divided by that of
            E||S_j k_j||^2.
    """

    groups: int
    lost: float


def find_bases(
    tensors: HeadTensors, moments: Moments, symmetries: Symmetries, method: Reconstructing, slots: Slots | None = None
) -> tuple[Bases, Bases]:
    """Returns the bases of keys and values; dimensions that may not be mixed are averaged.

    With slots, new keys rotate at the frequencies of the slots.
    """
    outputs = grouped(tensors.o, len(tensors.k))
    readers = torch.einsum("jhoa,jhob->jab", outputs, outputs)
    # each mixing of an old head becomes itself, or has slots in the new head
    of_keys = [(mixing, mixing) for mixing in symmetries.keys] if slots is None else slots.mixings
    of_values = [(mixing, mixing) for mixing in symmetries.values]
    return _bases(moments.queries, moments.keys, of_keys, method), _bases(readers, moments.values, of_values, method)


def _bases(metric: Tensor, moments: Tensor, mixings: Sequence[tuple[Mixing, Mixing]], method: Reconstructing) -> Bases:
    groups, size, width = moments.shape[:3]
    basis = torch.eye(width, dtype=torch.float64, device=metric.device).repeat(groups, size, 1, 1)
    for old, _ in mixings:
        basis[:, :, [*old.real, *old.imaginary]] = 0
    shared = basis / size
    lost = 0.0
    total = 0.0
    for number, group_metric in enumerate(grouped(metric, groups)):
        for old, new in mixings:
            if not new.real:  # a band without a slot
                continue
            part = _part_of(group_metric, moments[number], old)
            rank = (len(new.real),) if isinstance(method, SVD) else ()
            one_head = method.reconstruct(*part, *rank)
            old.put(basis[number], one_head.basis, new)
            new.put(shared[number], one_head.shared, old)
        shared[number] *= method.factor(moments[number], shared[number])
        # E||S_j (k_j - B_j kbar)||^2, and E||S_j k_j||^2
        crossed = torch.einsum("iab,ibjc->jac", shared[number], moments[number])  # E[kbar k_j^T]
        of_shared = torch.einsum("jac,jbc->ab", crossed, shared[number])  # E[kbar kbar^T]
        heads = torch.einsum("jajb->jab", moments[number])
        through = basis[number] @ crossed
        error = heads - through - through.mT + basis[number] @ of_shared @ basis[number].mT
        lost += float((group_metric * error).sum())
        total += float((group_metric * heads).sum())
    return Bases(basis.flatten(0, 1), shared.flatten(0, 1), groups, lost / total if total else 0.0)


def key_spectra(moments: Moments, method: SVD, mixings: Sequence[Mixing]) -> list[Tensor]:
    """Returns for each mixing of keys the sum over groups of its spectra (see `SVD.spectrum`)."""
    spectra = []
    for mixing in mixings:
        groups = zip(grouped(moments.queries, len(moments.keys)), moments.keys, strict=True)
        spectra.append(torch.stack([method.spectrum(*_part_of(metric, keys, mixing)) for metric, keys in groups]).sum(0))
    return spectra


def _part_of(metric: Tensor, moments: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Returns a mixing's part of both matrices; pairs are complex numbers: E[z_i conj(z_j)]."""
    r = list(mixing.real)
    i = list(mixing.imaginary)
    if not i:
        return metric[:, r][:, :, r], moments[:, r][:, :, :, r]

    def as_complex(part: Callable[[list[int], list[int]], Tensor]) -> Tensor:
        return torch.complex(part(r, r) + part(i, i), part(i, r) - part(r, i))

    return as_complex(lambda a, b: metric[:, a][:, :, b]), as_complex(lambda a, b: moments[:, a][:, :, :, b])


def pooled(tensors: HeadTensors, keys: Bases, values: Bases) -> HeadTensors:
    """Returns the weights with each head replaced by its group's reconstruction.

    Each key becomes k' = sum of P_i k_i, and each value likewise. Their consumers follow: q' = B_j^T q, W_O' = W_O B_j.
    """

    def shared(heads: Tensor, bases: Bases) -> Tensor:
        summed = grouped(bases.shared @ heads, bases.groups).sum(1)
        return summed.repeat_interleave(len(heads) // bases.groups, 0)

    queries = len(tensors.q) // len(tensors.k)
    q = keys.basis.mT.repeat_interleave(queries, 0) @ tensors.q
    o = tensors.o @ values.basis.repeat_interleave(queries, 0)
    return HeadTensors(q, shared(tensors.k, keys), shared(tensors.v, values), o)


def similar_order(
    tensors: HeadTensors, moments: Moments, symmetries: Symmetries, method: Reconstructing, groups: int
) -> list[int]:
    """Returns an order of the KV heads that puts similar heads into the same group.

    The loss of a group is estimated as the sum of the relative losses of its pairs, of keys and of values. Heads are exchanged
    between groups while that helps, from the current order and from random ones.
    """
    count = len(tensors.k)
    loss = torch.zeros(count, count, dtype=torch.float64)
    for pair in itertools.combinations(range(count), 2):
        keys, values = find_bases(tensors.in_order(pair), moments.in_order(pair, 1), symmetries, method)
        loss[pair] = loss[pair[::-1]] = keys.lost + values.lost
    generator = torch.Generator().manual_seed(0)
    group_of = torch.arange(count) // (count // groups)
    starts = [group_of, *(group_of[torch.randperm(count, generator=generator)] for _ in range(RESTARTS))]
    ends = [_improved(start, loss) for start in starts]
    # of ends that differ by rounding alone, the first
    best = min(ends, key=lambda end: float(torch.where(end[:, None] == end, loss, 0).sum().round(decimals=9))).tolist()
    return sorted(range(count), key=lambda head: (best.index(best[head]), head))


def _improved(group_of: Tensor, loss: Tensor) -> Tensor:
    """Exchanges the two heads whose exchange helps most until none helps.

    Exchanging a in group g with b in group h changes the sum over pairs by l(a, h) + l(b, g) - l(a, g) - l(b, h) - 2 l(a, b),
    where l(a, h) is the loss of a with all of h.
    """
    group_of = group_of.clone()
    while True:
        with_groups = loss @ torch.nn.functional.one_hot(group_of).to(loss)  # of each head with each group
        with_others = with_groups[:, group_of]  # of each head with the group of each other
        now = with_others.diagonal()
        change = with_others + with_others.T - now[:, None] - now - 2 * loss
        change[group_of[:, None] == group_of] = 0
        first, second = divmod(int(change.argmin()), len(group_of))
        if change[first, second] > -1e-12:
            return group_of
        group_of[[first, second]] = group_of[[second, first]]
