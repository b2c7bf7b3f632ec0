"""Gram matrices of the KV heads of a group.

Their covariance on data, or as the weights alone predict.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
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
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import copy_cache
from billhook.kv_heads.layout import HeadTensors, Projections, moved_values
from billhook.linalg import float64_device
from billhook.model.transformers_internals import attention_functions_as


@dataclass(frozen=True, eq=False)
class Moments:
    """Gram matrices of the heads of an attention module, by group, in float64.

    They are separate from the float32 Gram matrices of linear layers, because bases need float64 for each group of heads.

    Attributes:
        keys: Covariance of rotated keys z under the attention weights p of a query, `[groups, heads, width, heads, width]`: the
            sum over s of p_s (z_i,s - m_i) (z_j,s - m_j)^T, m = sum over s of p_s z_s, the mean over tokens and over the query
            heads of the group. Only differences between keys that a query attends to change its attention weights.
            E[k_i k_j^T] if the module calls no attention function of transformers.
        values: Second moments of values as queries receive them, E[u_i u_j^T], u = sum over s of p_s v_s, the same mean.
        queries: The sum of E[q q^T] over the query heads of each KV head, `[KV heads, width, width]`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    def in_order(self, order: Sequence[int], groups: int) -> "Moments":
        """Regroups the Gram matrices of all heads into several groups of reordered heads.

        For queries this equals `gather` on the reordered model. Keys and values keep the attention of all query heads of the
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

    Groups consist of consecutive KV heads. Keys and values depend on attention weights, which the model's own attention function
    applies to them, in any implementation: with groups of J heads it is called 2 J - 1 more times per batch, and differentiated
    once. A module that calls no function of transformers' attention interface runs J times instead, with the values of each
    other head. Both happen only as often as the smallest number of groups needs, if the other numbers are multiples of it.

    Memory: 2 G (J w)^2 + H w^2 float64 numbers per attention module, for G groups and H = G J heads of width w. For Llama-7B
    (H = 32, w = 128, 32 attention modules) that is 1.2 GB for G = 8, and 8.7 GB for G = 1, which a choice of groups needs.
    Within an attention module, 2048 tokens take another 0.13 GB and 1.1 GB. Several numbers of groups add up.
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
        self.tokens = zeros(3)  # that gave keys and values, as each query head of a KV head attends to them, and queries

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
            means = self.keys[number] / (of_keys * size), self.values[number] / (of_values * size)
            if not all(bool(mean.isfinite().all()) for mean in (*means, queries)):
                raise ValueError(f"batches: {name} gives NaN or infinite values")
            keys, values = (mean.view(number, size, mean.shape[1] // size, size, -1) for mean in means)
            moments[number] = Moments(keys, values, queries)
        return moments


class StopForward(BaseException):
    """Ends the forward pass of an attention module at the consumer layer of its heads."""


@dataclass(frozen=True)
class AttentionCall:
    """A call of an attention function, which can be repeated with other values."""

    function: Callable[..., tuple[Tensor, Any]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    options: Mapping[str, Any]
    output: Tensor

    def attend(self, values: Tensor) -> Tensor:
        """Returns the sums of values, `[examples, KV heads, tokens, width]`, that each query head attends to."""
        return self.function(self.module, self.query, self.key, values, **self.options)[0]

    def differentiable(self) -> "AttentionCall":
        """Returns the call with copies of tensors of inference mode, which autograd cannot save."""
        query, key, options = tree_map_only(
            Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, (self.query, self.key, self.options)
        )
        return replace(self, query=query, key=key, options=options)


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
        self._inside = set(model.get_submodule(projections.name).modules())
        self._weighted: bool | None = None  # whether by the weights of an attention function, as the first call tells
        self._observing = False
        self._keys: Tensor | None = None  # of the current call, `[tokens, KV heads * width]`
        self._read: list[Tensor] | None = None  # inputs of the consumer layer in the current call, once for each shift of values
        self._calls: list[AttentionCall] = []

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
        """Runs the forward pass, and adds its keys and values."""
        again: tuple[Sequence[Any], Mapping[str, Any]] = [], {}  # the arguments, if the forward pass may have to run once more
        if not self._weighted:
            again = [copy_cache(value) for value in args], {name: copy_cache(value) for name, value in kwargs.items()}
        self._read, self._calls, self._observing = [], [], True
        try:
            with attention_functions_as(self._called):
                output = forward(*args, **kwargs)
            self._observing = False
            if self._read:
                unshifted = self._read[0]
                self._weighted = self._is_weighted(unshifted) if self._weighted is None else self._weighted
                self._add_weighted(self._calls[0], unshifted) if self._weighted else self._add_shifted(forward, *again)
        finally:
            self._keys, self._read, self._calls, self._observing = None, None, [], False
        return output

    def _called(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Notes a call of an attention function by this module; other threads may run other modules."""
        options["attention_mask"] = attention_mask
        result = function(module, query, key, value, **options)
        if module in self._inside:
            self._calls.append(AttentionCall(function, module, query, key, value, options, result[0]))
        return result

    def _projected(self, linear: str, _: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Adds queries, and notes keys."""
        if not self._observing:
            return
        outputs, projections, sums = self._tokens_that_count(output, linear), self._projections, self.summed()
        if linear == projections.k.linear:
            self._keys = outputs[:, projections.k.index.flatten()]
        if linear == projections.q.linear:
            index = projections.q.index.reshape(sums.kv_heads, -1, sums.queries.shape[1])
            _add_products(sums.queries, outputs[:, index].transpose(0, 1).flatten(1, 2))
            sums.tokens[2] += len(outputs)

    def _attended(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        projections = self._projections
        if self._read is None:
            raise ValueError(f"{projections.name} is not called as a module, so its values cannot be recorded")
        if self._observing and self._read:
            raise ValueError(f"{projections.name} reads its heads several times in one call, so its values cannot be recorded")
        index = projections.o.index.reshape(self._fewest, self._size, projections.queries, -1)
        self._read.append(self._tokens_that_count(args[0], projections.o.linear)[:, index])
        if not self._observing:
            raise StopForward

    def _is_weighted(self, read: Tensor) -> bool:
        """Returns True if the module called one attention function, and the consumer layer read its output."""
        if len(self._calls) != 1:
            return False
        (call,), projections = self._calls, self._projections
        if call.query.shape[1] != len(projections.q.index) or call.key.shape[3] != projections.k.index.shape[1]:
            return False
        same = math.prod(call.output.shape[2:]) == math.prod(read.shape[1:])
        return same and torch.equal(self._by_group(call.output), read)

    def _by_group(self, output: Tensor) -> Tensor:
        """Returns what query heads attend to, `[tokens, groups, heads, queries, width]`."""
        rows = self._tokens_that_count(output.flatten(2), self._projections.o.linear)
        return rows.reshape(len(rows), self._fewest, self._size, self._projections.queries, output.shape[3])

    def _add_weighted(self, call: AttentionCall, unshifted: Tensor) -> None:
        """Adds keys and values by the attention weights of a call, whose output is the first of them."""
        kv_heads, sums = self._projections.kv_heads, self.summed()
        examples, _, tokens, _ = call.key.shape
        repeats = call.key.shape[1] // kv_heads  # of heads that the module has repeated for their queries

        def shifts(heads: Tensor) -> list[Tensor]:
            grouped_heads = heads[:, ::repeats].reshape(examples, self._fewest, self._size, tokens, -1)
            moved = (grouped_heads.roll(-shift, 2).flatten(1, 2) for shift in range(1, self._size))
            return [self._by_group(call.attend(heads.repeat_interleave(repeats, 1))) for heads in moved]

        self._add_received(sums.values, [unshifted, *shifts(call.value)])
        # a constant changes no covariance unless weights do not add up to 1, and large sums would be rounded more
        constant = 0 if call.options.get("s_aux") is not None else call.key.mean((0, 2), keepdim=True)
        keys = call.key - constant
        self._add_received(sums.keys, [self._by_group(call.attend(keys)), *shifts(keys)], -1)
        with torch.inference_mode(False), torch.enable_grad():  # the gradient of the sum over queries is the sum of their weights
            values = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device, requires_grad=True)
            (weights,) = torch.autograd.grad(self._by_group(call.differentiable().attend(values))[..., 0].sum(), values)
        weights = weights[..., 0].to(unshifted.dtype).reshape(examples, kv_heads, repeats, tokens).sum(2)
        keys = keys[:, ::repeats].to(unshifted.dtype)
        for number, total in sums.keys.items():
            of_group = weights.reshape(examples, number, -1, tokens).sum(2)
            by_group = keys.reshape(examples, number, kv_heads // number, tokens, -1)
            rows = by_group.transpose(2, 3).flatten(3)  # [examples, groups, tokens, heads * width]
            _add_products(total, (rows * of_group.clamp_min(0).sqrt()[..., None]).transpose(0, 1).flatten(1, 2))
        sums.tokens[:2] += len(unshifted) * self._projections.queries

    def _add_shifted(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Adds keys, and values as further forward passes give them, with those of each other head of the group."""
        projections, sums, size = self._projections, self.summed(), self._size
        linear, heads = self._model.get_submodule(projections.v.linear), range(projections.kv_heads)
        for shift in range(1, size):
            moved = moved_values(linear, projections.v, [head // size * size + (head + shift) % size for head in heads])
            with replaced({linear: moved}), suppress(StopForward):
                forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
        read = self._read or []
        self._add_received(sums.values, read)
        if self._keys is not None:
            for number, total in sums.keys.items():
                queries = projections.queries * projections.kv_heads // number
                _add_products(
                    total, self._keys.reshape(len(self._keys), number, self._keys.shape[1] // number).transpose(0, 1), queries
                )
            sums.tokens[0] += len(self._keys) * projections.queries
        sums.tokens[1] += len(read[0]) * projections.queries

    def _add_received(self, totals: Mapping[int, Tensor], shifts: Sequence[Tensor], sign: int = 1) -> None:
        """Adds products of what query heads receive from each head of their group; a shift is the distance of that head."""
        for number, total in totals.items():
            size = self._projections.kv_heads // number
            for head in range(self._size):  # whose query heads attend
                first = head // size * size
                received = [shifts[(other - head) % self._size][:, :, head] for other in range(first, first + size)]
                stacked = torch.stack(received, 3)  # [tokens, fewest groups, query heads, heads, width]
                flat = stacked.transpose(0, 1).reshape(self._fewest, -1, total.shape[1])
                _add_products(total.view(self._fewest, -1, *total.shape[1:])[:, head // size], flat, sign)

    def _tokens_that_count(self, tensor: Tensor, linear: str) -> Tensor:
        """Returns the non-padding tokens as rows, in float32 or wider."""
        tensor, mask = tensor.flatten(0, -2), self.masks().get(linear)
        if mask is not None and mask.numel() == len(tensor):
            tensor = tensor[mask.flatten().clone()]  # autograd may save it, and it may come from inference mode
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def _add_products(total: Tensor, values: Tensor, factor: int = 1) -> None:
    with full_precision():  # whatever the training run has set
        total.add_((values.mT @ values).to(total.device), alpha=factor)
