"""Gram matrices of the KV heads of a group.

Their covariance on data, or as the weights alone predict.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.calibration.calibration import log_only_self_generated
from billhook.engine.batches import Run
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.passes import SideBySide
from billhook.engine.state import evaluating_without_grad, full_precision, overridden, replaced
from billhook.engine.store import store_of
from billhook.engine.walk import copy_cache
from billhook.kv_heads.layout import HeadTensors, Projections, moved_values
from billhook.linalg import float64_device
from billhook.model.repeat_kv import repeat_layout_of


@dataclass(frozen=True, eq=False)
class Moments:
    """Gram matrices of the heads of an attention module, by group, in float64.

    They are separate from the float32 Gram matrices of linear layers, because bases need float64 for each group of heads.

    Attributes:
        keys: E[k_i k_j^T], the mean over tokens, `[groups, heads, width, heads, width]`.
        values: The same of values as the query heads of the group receive them: with a_t the attention weights of query head h,
            E[u_i u_j^T], u_i = sum over t of a_t v_i,t, the mean over tokens and over the query heads h of the group.
        queries: The sum of E[q q^T] over the query heads of each KV head, `[KV heads, width, width]`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    def in_order(self, order: Sequence[int], groups: int) -> "Moments":
        """Regroups the Gram matrices of all heads into several groups of reordered heads.

        For keys and queries this equals `gather` on the reordered model. Values keep the attention of all query heads of the
        module, not only those of their group.
        """
        heads = torch.tensor(order).reshape(groups, -1)
        keys, values = (torch.stack([m[0][group][:, :, group] for group in heads]) for m in (self.keys, self.values))
        return Moments(keys, values, self.queries[heads.flatten()])


def weight_moments(tensors: HeadTensors, groups: int) -> Moments:
    """Returns Gram matrices without data, for independent inputs of equal size."""
    keys, values, queries = grouped(tensors.k, groups), grouped(tensors.v, groups), grouped(tensors.q, len(tensors.k))
    pairs, squares = "gian,gjbn->giajb", "jhan,jhbn->jab"
    return Moments(torch.einsum(pairs, keys, keys), torch.einsum(pairs, values, values), torch.einsum(squares, queries, queries))


def grouped(heads: Tensor, groups: int) -> Tensor:
    """Returns heads, `[heads, ...]`, in consecutive groups, `[groups, heads, ...]`."""
    return heads.reshape(groups, -1, *heads.shape[1:])


def gather(
    model: nn.Module,
    projections: Mapping[str, Projections],
    groups: Mapping[str, Collection[int]],
    trials: Sequence[Run],
    comm: Comm = SINGLE_PROCESS,
) -> dict[str, dict[int, Moments]]:
    """Returns the Gram matrices of attention modules, by name and number of groups.

    Groups consist of consecutive KV heads. Keys and queries are recorded before a rotary embedding. Values depend on the
    attention weights, so each attention module runs once more for each other head of a group, with that head's values. It runs
    only as often as the smallest number of groups needs, if the other numbers are multiples of it.

    With groups of J heads, each attention module runs J times per batch. Memory: 2 G (J w)^2 + H w^2 float64 numbers per
    attention module, for G groups and H = G J heads of width w. For Llama-7B (H = 32, w = 128, 32 attention modules) that is 1.2
    GB for G = 8, and 8.7 GB for G = 1, which a choice of groups needs. Within an attention module, 2048 tokens take another 0.13
    GB and 1.1 GB. Several numbers of groups add up.
    """
    log_only_self_generated([trial.source for trial in trials])
    listening = MomentPass(model, projections, groups, trials, comm)
    with store_of(model).independently(comm):
        listening.run(SideBySide(model))
    return listening.take(*projections)


class MomentPass:
    """A pass of runs over an unchanged model that sums Gram matrices.

    `take` may be called within it.

    Args:
        model: The model.
        projections: The attention modules to record, by name.
        groups: By attention module, the numbers of groups of consecutive KV heads.
        trials: The runs.
        comm: The ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: Mapping[str, Projections],
        groups: Mapping[str, Collection[int]],
        trials: Sequence[Run],
        comm: Comm = SINGLE_PROCESS,
    ) -> None:
        self._model, self._trials, self._comm = model, trials, comm
        self._listeners = {name: _Listener(model, attention, groups[name]) for name, attention in projections.items()}
        self._hooks: dict[str, ExitStack] = {}

    def run(self, together: SideBySide) -> None:
        """Runs all blocks in the order of the side-by-side runner."""
        with evaluating_without_grad(self._model), ExitStack() as stack:
            for name in self._listeners:  # no local keeps a listener, and what it adds up, once its block has been left
                self._listeners[name].masks = lambda: self._trials[together.run].tokens
                self._hooks[name] = stack.enter_context(ExitStack())
                self._hooks[name].enter_context(self._listeners[name].listening())
            together([run.visit for run in self._trials])

    def take(self, *names: str) -> dict[str, dict[int, Moments]]:
        """Returns the Gram matrices of finished attention modules, and frees their sums."""
        sums = {}
        for name in names:
            self._hooks.pop(name).close()
            sums[name] = self._listeners.pop(name).summed()
        self._comm.sum_(*(tensor for attention in sums.values() for tensor in attention.tensors()))
        return {name: attention.moments(name) for name, attention in sums.items()}


class MomentSums:
    """Sums over tokens for `Moments`, for several numbers of groups."""

    def __init__(self, device: torch.device, projections: Projections, groups: Collection[int]) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=float64_device(device))
        keys, values = projections.k.index.size, projections.v.index.size
        self.kv_heads = projections.kv_heads
        self.keys = {number: zeros(number, keys // number, keys // number) for number in groups}
        self.values = {number: zeros(number, values // number, values // number) for number in groups}
        self.queries = zeros(self.kv_heads, keys // self.kv_heads, keys // self.kv_heads)
        self.tokens = zeros(3)  # of which keys, values (as one head attends to them), queries were seen

    def tensors(self) -> list[Tensor]:
        """Returns the sums themselves, to be reduced over ranks in place."""
        return [*self.keys.values(), *self.values.values(), self.queries, self.tokens]

    def moments(self, name: str) -> dict[int, Moments]:
        """Returns the means for the attention module of this name, by number of groups."""
        of_keys, of_values, of_queries = counts = self.tokens.tolist()
        if not all(counts):
            raise ValueError(f"batches: {name} is not called, or receives no non-padding token")
        moments, queries = {}, self.queries / of_queries
        for number in self.keys:
            size = self.kv_heads // number
            means = self.keys[number] / of_keys, self.values[number] / (of_values * size)
            if not all(bool(mean.isfinite().all()) for mean in (*means, queries)):
                raise ValueError(f"batches: {name} gives NaN or infinite values")
            keys, values = (mean.view(number, size, mean.shape[1] // size, size, -1) for mean in means)
            moments[number] = Moments(keys, values, queries)
        return moments


class StopForward(BaseException):
    """Ends the forward pass of an attention module at the consumer layer of its heads."""


class _Listener:
    """Records an attention module at the non-padding tokens of the current batch."""

    def __init__(self, model: nn.Module, projections: Projections, groups: Collection[int]) -> None:
        self._model, self._projections, self._groups = model, projections, groups
        self._fewest = math.gcd(*groups)  # the number of groups in which those of all other numbers lie
        self._size = projections.kv_heads // self._fewest
        weight = model.get_submodule(projections.k.linear).get_parameter("weight")
        # where weights rest, which is asked before a block computes elsewhere; a block that is streamed may not be there
        self._device = next(model.parameters()).device if weight.is_meta else weight.device
        self._sums: MomentSums | None = None  # made at the first call, as those of other blocks have gone by then
        self.masks: Callable[[], Mapping[str, Tensor]] = dict
        self._read: list[Tensor] | None = None  # what the linear behind the heads is given, once for each shift
        self._unshifted = False

    def summed(self) -> MomentSums:
        """Returns the sums, zero if the attention module was not called."""
        self._sums = self._sums or MomentSums(self._device, self._projections, self._groups)
        return self._sums

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Overrides the forward pass of the attention module, and hooks its linear layers."""
        projections, module = self._projections, self._model.get_submodule(self._projections.name)
        with ExitStack() as stack:
            for linear in {projections.q.linear, projections.k.linear}:
                hook = partial(self._projected, linear)
                stack.callback(self._model.get_submodule(linear).register_forward_hook(hook).remove)
            reader = self._model.get_submodule(projections.o.linear)
            stack.callback(reader.register_forward_pre_hook(self._attended).remove)
            stack.enter_context(overridden(module, forward=partial(self._visit, module.forward)))
            yield

    def _visit(self, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the forward pass with the values of each other head of the group, and unchanged."""
        self._read, size, rows = [], self._size, self._projections.v
        linear, heads = self._model.get_submodule(rows.linear), range(self._projections.kv_heads)
        for shift in range(1, size):
            moved = moved_values(linear, rows, [head // size * size + (head + shift) % size for head in heads])
            with replaced({linear: moved}), suppress(StopForward):
                forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
        self._unshifted = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._unshifted, self._read = False, None

    def _projected(self, linear: str, module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Adds keys or queries, or both if a linear layer produces them."""
        if not self._unshifted:
            return
        if (handing := repeat_layout_of(module)) is not None:
            output = handing.undo_repeat(output)
        outputs, projections, sums = self._tokens_that_count(output, linear), self._projections, self.summed()
        with full_precision():
            if linear == projections.k.linear:
                for number, total in sums.keys.items():
                    _add_products(total, outputs[:, projections.k.index.reshape(number, -1)].transpose(0, 1))
                sums.tokens[0] += len(outputs)
            if linear == projections.q.linear:
                index = projections.q.index.reshape(sums.kv_heads, -1, sums.queries.shape[1])
                _add_products(sums.queries, outputs[:, index].transpose(0, 1).flatten(1, 2))
                sums.tokens[2] += len(outputs)

    def _attended(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        projections = self._projections
        if self._read is None:
            raise ValueError(f"{projections.name} is not called as a module, so its values cannot be recorded")
        index = projections.o.index.reshape(self._fewest, self._size, projections.queries, -1)
        self._read.append(self._tokens_that_count(args[0], projections.o.linear)[:, index])
        if not self._unshifted:
            raise StopForward
        if len(self._read) != self._size:
            raise ValueError(f"{projections.name} reads its heads several times in one call, so its values cannot be recorded")
        shifts, sums = [self._read[-1], *self._read[:-1]], self.summed()  # the attention as it is comes last
        with full_precision():  # whatever the fit has set
            for number, total in sums.values.items():
                self._add_values(total, projections.kv_heads // number, shifts)
            sums.tokens[1] += shifts[0].shape[0] * projections.queries
        self._read = []

    def _add_values(self, total: Tensor, size: int, shifts: Sequence[Tensor]) -> None:
        """Adds products of the values, as each head of the group attends to them."""
        for head in range(self._size):  # whose query heads attend
            first = head // size * size
            values = [shifts[(other - head) % self._size][:, :, head] for other in range(first, first + size)]
            stacked = torch.stack(values, 3)  # [tokens, fewest groups, query heads, values of, width]
            flat = stacked.transpose(0, 1).reshape(self._fewest, -1, total.shape[1])
            _add_products(total.view(self._fewest, -1, *total.shape[1:])[:, head // size], flat)

    def _tokens_that_count(self, tensor: Tensor, linear: str) -> Tensor:
        """Returns the non-padding tokens as rows, in float32 or wider."""
        tensor, mask = tensor.detach().flatten(0, -2), self.masks().get(linear)
        if mask is not None and mask.numel() == len(tensor):
            tensor = tensor[mask.flatten()]
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def _add_products(total: Tensor, values: Tensor) -> None:
    total.add_((values.mT @ values).to(total.device))
