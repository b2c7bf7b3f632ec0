"""Weights with which the KV heads of a group are equal, the groups that lose least by that, and the moments that say so."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.calibration.calibration import tell_own
from billhook.engine.batches import Run
from billhook.engine.comm import ALONE, Comm
from billhook.engine.state import overridden, precisely, replaced, undisturbed
from billhook.engine.store import store_of
from billhook.engine.walk import spare
from billhook.kv_heads.freedom import Block, Freedom, Freedoms, in_order
from billhook.kv_heads.layout import Projections, Stacks, moved_values
from billhook.kv_heads.methods import Rendered
from billhook.linalg import float64_device
from billhook.model.handed import handing_of


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the heads of one attention, group by group, about zero, biases included: float64.

    Apart from `InputMoments`, as that sums in float32 all that one linear is given, and bases take float64 of each group's heads.

    Attributes:
        keys: E[k_i k_j^T], the mean over tokens, `[groups, heads, width, heads, width]`.
        values: The same of values, as the query heads of the group are given them: with a_t what query head h attends to with,
            E[u_i u_j^T], u_i = sum over t of a_t v_i,t, the mean over tokens and over the query heads h of the group.
        queries: The sum of E[q q^T] over the query heads of each KV head, `[KV heads, width, width]`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


def gather(
    model: nn.Module,
    places: Mapping[str, Projections],
    groups: Mapping[str, int],
    trials: Sequence[Run],
    comm: Comm = ALONE,
) -> dict[str, Moments]:
    """Returns the moments of each attention, in so many groups of consecutive KV heads, on all batches; the model stays as it is.

    Keys and queries are seen before any rotary embedding. Of values it matters what attention makes of them, so each attention
    runs once more for each other head of a group, with that one's values instead of its own.

    In groups of J heads each attention runs J times a batch. Held throughout are 2 G (J w)^2 + H w^2 numbers in float64 of each
    attention, for G groups and H = G J heads of width w: of Llama-7B (H = 32, w = 128, 32 attentions) 1.2 GB for G = 8, and
    8.7 GB for G = 1, which a choice of groups needs; within an attention, with 2048 tokens in a batch, 0.13 GB and 1.1 GB more.
    """
    each = gather_each(model, places, {name: [number] for name, number in groups.items()}, trials, comm)
    return {name: own[groups[name]] for name, own in each.items()}


def gather_each(
    model: nn.Module,
    places: Mapping[str, Projections],
    groups: Mapping[str, Collection[int]],
    trials: Sequence[Run],
    comm: Comm = ALONE,
) -> dict[str, dict[int, Moments]]:
    """Returns what `gather` does for several numbers of groups, by attention and number; what is held adds up.

    An attention runs no more often than the fewest groups take, where the other numbers are multiples of that one.
    """
    tell_own([trial.source for trial in trials])
    sums = {name: Sums(model, place, groups[name]) for name, place in places.items()}
    with undisturbed(model), ExitStack() as stack:
        for one in sums.values():
            stack.enter_context(one.listening())
        stack.enter_context(store_of(model).apart(comm))
        for trial in trials:
            for one in sums.values():
                one.masks = trial.tokens
            trial.visit()
    comm.sum_(*(tensor for one in sums.values() for tensor in one.tensors()))
    return {name: one.moments() for name, one in sums.items()}


class _Enough(BaseException):
    """Ends an attention's forward at the linear that reads the heads: the rest would be for nothing."""


class Sums:
    """Listens to one attention, and adds up; `masks` say which tokens of the batch count, by linear, where not all do."""

    def __init__(self, model: nn.Module, place: Projections, groups: Collection[int]) -> None:
        self._model, self._place = model, place
        self._widest = math.gcd(*groups)  # the number of groups in which all others lie
        self._size = place.kv_heads // self._widest
        weight = model.get_submodule(place.k.linear).get_parameter("weight")
        device = next(model.parameters()).device if weight.is_meta else weight.device  # a block that is streamed may not be there
        zeros = partial(torch.zeros, dtype=torch.float64, device=float64_device(device))
        keys, values = (rows.index.shape[1] * place.kv_heads for rows in (place.k, place.v))
        self._keys = {number: zeros(number, keys // number, keys // number) for number in groups}
        self._values = {number: zeros(number, values // number, values // number) for number in groups}
        self._queries = zeros(place.kv_heads, place.k.index.shape[1], place.k.index.shape[1])
        self._tokens = zeros(3)  # of which keys, values (as one head attends to them), queries were seen
        self.masks: Mapping[str, Tensor] = {}
        self._given: list[Tensor] | None = None  # to what reads the heads, once for each shift
        self._proper = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overrides the attention's forward, and listens to its linears."""
        place, module = self._place, self._model.get_submodule(self._place.name)
        with ExitStack() as stack:
            for linear in {place.q.linear, place.k.linear}:
                hook = partial(self._projected, linear)
                stack.callback(self._model.get_submodule(linear).register_forward_hook(hook).remove)
            reader = self._model.get_submodule(place.o.linear)
            stack.callback(reader.register_forward_pre_hook(self._attended).remove)
            stack.enter_context(overridden(module, forward=partial(self._visit, module.forward)))
            yield

    def _visit(self, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the attention's forward with the values of each of the others of the group, and then as it is."""
        self._given, size = [], self._size
        for shift in range(1, size):
            others = [head // size * size + (head + shift) % size for head in range(self._place.kv_heads)]
            moved = moved_values(self._model, self._place, others)
            with replaced({self._model.get_submodule(n): own for n, own in moved.items()}), suppress(_Enough):
                forward(*map(spare, args), **{name: spare(value) for name, value in kwargs.items()})
        self._proper = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._proper, self._given = False, None

    def _projected(self, linear: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self._proper:
            return
        if (handing := handing_of(module)) is not None:
            output = handing.take_back(output)
        given, place = self._plain(output, linear), self._place
        with precisely():
            if linear == place.k.linear:
                for number, sums in self._keys.items():
                    keys = given[:, place.k.index.reshape(number, -1)].transpose(0, 1)
                    sums += (keys.mT @ keys).to(sums.device)
                self._tokens[0] += len(given)
            if linear == place.q.linear:
                index = place.q.index.reshape(place.kv_heads, -1, self._queries.shape[1])
                queries = given[:, index].transpose(0, 1).flatten(1, 2)
                self._queries += (queries.mT @ queries).to(self._queries.device)
                self._tokens[2] += len(given)

    def _attended(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._given is None:
            raise ValueError(f"{self._place.name} is not called as a module: its values cannot be seen")
        place = self._place
        index = place.o.index.reshape(self._widest, self._size, place.queries, -1)
        self._given.append(self._plain(args[0], place.o.linear)[:, index])
        if not self._proper:
            raise _Enough
        if len(self._given) != self._size:
            raise ValueError(f"{place.name} reads its heads several times in one call: what is of which values cannot be told")
        shifts = [self._given[-1], *self._given[:-1]]  # the attention as it is comes last
        with precisely():
            for number, sums in self._values.items():
                self._add_values(sums, place.kv_heads // number, shifts)
            self._tokens[1] += shifts[0].shape[0] * place.queries
        self._given = []

    def _add_values(self, sums: Tensor, size: int, shifts: Sequence[Tensor]) -> None:
        """Adds up how values vary together in groups of a size, as each head of the group attends to them."""
        for own in range(self._size):  # the head whose query heads attend
            group = range(own // size * size, own // size * size + size)
            values = [shifts[(other - own) % self._size][:, :, own] for other in group]
            each = torch.stack(values, 3)  # [tokens, widest groups, query heads, values of, width]
            flat = each.transpose(0, 1).reshape(self._widest, -1, sums.shape[1])
            sums.view(self._widest, -1, *sums.shape[1:])[:, own // size].add_((flat.mT @ flat).to(sums.device))

    def _plain(self, tensor: Tensor, linear: str) -> Tensor:
        """Returns the tokens that count, one after the other, in float32 at least."""
        tensor, mask = tensor.detach().flatten(0, -2), self.masks.get(linear)
        if mask is not None and mask.numel() == len(tensor):
            tensor = tensor[mask.flatten()]
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, not copies, to be summed over ranks in place."""
        return [*self._keys.values(), *self._values.values(), self._queries, self._tokens]

    def moments(self) -> dict[int, Moments]:
        """Returns the means of what was added up, by the number of groups."""
        counts = self._tokens.tolist()
        if not all(counts):
            raise ValueError(f"batches: {self._place.name} is not called, or no token counts")
        return {number: self._means(number, *counts) for number in self._keys}

    def _means(self, number: int, of_keys: float, of_values: float, of_queries: float) -> Moments:
        size = self._place.kv_heads // number
        keys, values = self._keys[number] / of_keys, self._values[number] / (of_values * size)
        queries = self._queries / of_queries
        if not all(bool(one.isfinite().all()) for one in (keys, values, queries)):
            raise ValueError(f"batches: {self._place.name} gives NaN or infinite numbers")
        keys, values = (one.view(number, size, one.shape[1] // size, size, -1) for one in (keys, values))
        return Moments(keys, values, queries)


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
