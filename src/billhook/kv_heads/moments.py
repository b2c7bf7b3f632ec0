"""Gram matrices of the KV heads of a group, on data or as the weights alone predict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from billhook.calibration.calibration import log_only_self_generated
from billhook.engine import (
    Comm,
    Run,
    SideBySide,
    evaluating_without_grad,
    full_precision,
    in_block_order,
    overridden,
    store_of,
    tree_map_only,
)
from billhook.kv_heads.layout import HeadTensors, Projections
from billhook.linalg import float64_device
from billhook.model import attention_functions_as, check_called_once

NOT_SEEN = "svd needs attention through transformers' interface; use aligned without batches"
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Moments:
    """Gram matrices of the heads of an attention module, by group, in float64.

    They are separate from the float32 Gram matrices of linear layers, because bases need float64 for each group of heads.

    Attributes:
        keys: Covariance of rotated keys z under the attention weights p of a query, `[groups, heads, width, heads, width]`: the
            sum over s of p_s (z_i,s - m_i) (z_j,s - m_j)^T, m = sum over s of p_s z_s, the mean over tokens and over the query
            heads of the group. Only differences between keys that a query attends to change its attention weights.
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


Use = Callable[[nn.Module | None, Iterable[tuple[str, Moments]]], T]
"""Receives a block (None for modules outside of blocks), and its attention modules with their Gram matrices."""


def weight_moments(tensors: HeadTensors, groups: int) -> Moments:
    """Returns Gram matrices without data, for independent inputs of equal size."""
    keys = grouped(tensors.k, groups)
    values = grouped(tensors.v, groups)
    queries = grouped(tensors.q, len(tensors.k))
    pairs = "gian,gjbn->giajb"
    squares = "jhan,jhbn->jab"
    return Moments(torch.einsum(pairs, keys, keys), torch.einsum(pairs, values, values), torch.einsum(squares, queries, queries))


def grouped(heads: Tensor, groups: int) -> Tensor:
    """Returns heads, `[heads, ...]`, in consecutive groups, `[groups, heads, ...]`."""
    return heads.reshape(groups, -1, *heads.shape[1:])


def gather(
    model: nn.Module,
    projections: Mapping[str, Projections],
    groups: Mapping[str, int],
    runs: Sequence[Run],
    use: Use[T],
    comm: Comm,
) -> list[T]:
    """Passes on the Gram matrices of attention modules when all runs have left a block.

    Groups consist of consecutive KV heads. Keys and values depend on attention weights, which the model's own attention function
    applies to them, in any implementation: with groups of J heads it is called 2 J - 1 more times per batch, and differentiated
    once. If a module is called again after its block, the pass is repeated, with the Gram matrices of all modules in memory.

    Memory: 2 G (J w)^2 + H w^2 float64 numbers per attention module of a block, for G groups and H = G J heads of width w. For
    Llama-7B (H = 32, w = 128) that is 38 MB for G = 8, and 273 MB for G = 1, which a choice of groups needs. Within an attention
    module, 2048 tokens take another 0.13 GB and 1.1 GB.

    Args:
        model: The model, which stays unchanged.
        projections: The attention modules, by name. They call transformers' attention interface.
        groups: Number of groups of each attention module.
        runs: The batches.
        use: Receives the Gram matrices of a block.
        comm: The ranks, which leave each block together.

    Returns:
        The results of `use`.
    """
    log_only_self_generated([run.source for run in runs])
    check_called_once(model, runs)

    def run_all(by_block: bool) -> tuple[list[T], list[str]]:
        """Returns the results, and the names of modules that were called again after their block."""
        listeners = {name: _Listener(model, attention, groups[name]) for name, attention in projections.items()}
        # blocks that hold an attention module, until runs have left them
        results = []
        ahead = dict[str, set[nn.Module | None]]()

        def leave(block: nn.Module | None) -> None:
            names = []
            for name, holding in list(ahead.items()):
                if block is None or holding == {block}:
                    del ahead[name]
                    names.append(name)
                holding.discard(block)
            if names:
                results.append(use(block, ((name, listeners[name].moments(comm)) for name in names)))

        together = SideBySide(model, leave if by_block else None, comm)
        with ExitStack() as stack:
            for name, listener in listeners.items():
                attention = model.get_submodule(name)
                ahead[name] = {block for block in together.blocks if attention in set(block.modules())}
                listener.masks = lambda: runs[together.run].tokens
                stack.enter_context(overridden(attention, forward=partial(listener.visit, attention.forward)))
                queries = model.get_submodule(listener.projections.q.linear)
                stack.callback(queries.register_forward_hook(listener.add_queries).remove)
            together([run.visit for run in runs])
            leave(None)  # what is outside of blocks, or has not been called
        return results, [name for name, listener in listeners.items() if listener.repeated]

    with evaluating_without_grad(model), in_block_order(model, [run.visit for run in runs], comm):
        for by_block in (True, False):
            results, repeated = run_all(by_block)
            if not any(comm.gather(repeated)):
                break
            store_of(model).check_can_hold_all(f"model: {repeated} are called again after their block")
    return results


class MomentSums:
    """Sums over tokens for `Moments`."""

    def __init__(self, device: torch.device, projections: Projections, groups: int) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=float64_device(device))
        keys = projections.k.index.size // groups
        values = projections.v.index.size // groups
        width = projections.k.index.shape[1]
        self.keys = zeros(groups, keys, keys)
        self.values = zeros(groups, values, values)
        self.queries = zeros(projections.kv_heads, width, width)
        self.tokens = zeros(2)  # that gave keys and values, as each query head of a KV head attends to them, and queries

    def moments(self, name: str, comm: Comm) -> Moments:
        """Returns the means over all ranks for an attention module; reduces sums in place."""
        comm.sum_(self.keys, self.values, self.queries, self.tokens)
        of_heads, of_queries = counts = self.tokens.tolist()
        if not all(counts):
            raise ValueError(f"batches: {name} is not called, or receives no non-padding token")
        groups = len(self.keys)
        size = len(self.queries) // groups
        means = self.keys / (of_heads * size), self.values / (of_heads * size), self.queries / of_queries
        if not all(bool(mean.isfinite().all()) for mean in means):
            raise ValueError(f"batches: {name} gives NaN or infinite values")
        keys, values = (mean.view(groups, size, mean.shape[1] // size, size, -1) for mean in means[:2])
        return Moments(keys, values, means[2])


class _Listener:
    """Records an attention module at the non-padding tokens of the current batch."""

    def __init__(self, model: nn.Module, projections: Projections, groups: int) -> None:
        self.projections = projections
        self._groups = groups
        self._size = projections.kv_heads // groups
        weight = model.get_submodule(projections.k.linear).get_parameter("weight")
        # where weights rest, which is asked before a block computes elsewhere; a block that is streamed may not be there
        self._device = next(model.parameters()).device if weight.is_meta else weight.device
        self._sums: MomentSums | None = None  # made at the first call, as those of other blocks have gone by then
        self.masks: Callable[[], Mapping[str, Tensor]] = dict
        self._inside = set(model.get_submodule(projections.name).modules())
        self._observing = self._finished = self.repeated = False
        self._calls = list[Callable[[], None]]()  # of attention functions, to add after the forward pass

    def moments(self, comm: Comm) -> Moments:
        """Returns the means, and frees the sums."""
        sums = self._summed()
        self._sums = None
        self._finished = True
        return sums.moments(self.projections.name, comm)

    def _summed(self) -> MomentSums:
        self._sums = self._sums or MomentSums(self._device, self.projections, self._groups)
        return self._sums

    def visit(self, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the forward pass, and adds its projections and attended values."""
        if self._finished:
            self.repeated = True
            return forward(*args, **kwargs)
        self._calls = []
        self._observing = True
        try:
            with attention_functions_as(self._attend):
                output = forward(*args, **kwargs)
            if len(self._calls) != 1:
                raise ValueError(f"{self.projections.name}: {NOT_SEEN}")
            self._calls[0]()
        finally:
            self._calls = []
            self._observing = False
        return output

    def add_queries(self, _: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Adds outputs of the layer of queries within the module's forward pass."""
        if not self._observing:
            return
        queries = self.projections.q
        sums = self._summed()
        outputs = self._tokens_that_count(output, queries.linear)
        index = queries.index.reshape(len(sums.queries), -1, sums.queries.shape[1])
        _add_products(sums.queries, outputs[:, index].transpose(0, 1).flatten(1, 2))
        sums.tokens[1] += len(outputs)

    def _by_group(self, output: Tensor) -> Tensor:
        """Returns what query heads attend to, `[tokens, groups, heads, queries, width]`."""
        rows = self._tokens_that_count(output.flatten(2), self.projections.o.linear)
        return rows.reshape(len(rows), self._groups, self._size, self.projections.queries, output.shape[3])

    def _attend(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Calls an attention function, and notes the call unless it is of another thread."""
        options["attention_mask"] = attention_mask
        result = function(module, query, key, value, **options)
        if module in self._inside:
            self._calls.append(partial(self._add, partial(function, module), query, key, value, options, result[0]))
        return result

    def _add(
        self,
        function: Callable[..., tuple[Tensor, Any]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        """Adds keys and values by attention weights, which it reads by repeating the call."""
        kv_heads = self.projections.kv_heads
        groups = self._groups
        sums = self._summed()
        examples, _, tokens, _ = key.shape
        repeats = key.shape[1] // kv_heads  # of heads that the module has repeated for their queries

        def shifts(heads: Tensor) -> list[Tensor]:
            grouped_heads = heads[:, ::repeats].reshape(examples, groups, self._size, tokens, -1)
            moved = (grouped_heads.roll(-shift, 2).flatten(1, 2).repeat_interleave(repeats, 1) for shift in range(1, self._size))
            return [self._by_group(function(query, key, values, **options)[0]) for values in moved]

        received = self._by_group(output)
        self._add_received(sums.values, [received, *shifts(value)])
        # a constant changes no covariance unless weights do not add up to 1, and large sums would be rounded more
        constant = 0 if options.get("s_aux") is not None else key.mean((0, 2), keepdim=True)
        keys = key - constant
        self._add_received(sums.keys, [self._by_group(function(query, key, keys, **options)[0]), *shifts(keys)], -1)
        with torch.inference_mode(False), torch.enable_grad():  # the gradient of the sum over queries is the sum of their weights
            zeros = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device, requires_grad=True)
            # autograd cannot save tensors of inference mode
            saved_query, saved_key, saved_options = tree_map_only(
                Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, (query, key, options)
            )
            attended = self._by_group(function(saved_query, saved_key, zeros, **saved_options)[0])
            (weights,) = torch.autograd.grad(attended[..., 0].sum(), zeros)
        weights = weights[..., 0].to(received.dtype).reshape(examples, groups, -1, tokens).sum(2)
        by_group = keys[:, ::repeats].to(received.dtype).reshape(examples, groups, self._size, tokens, -1)
        rows = by_group.transpose(2, 3).flatten(3)  # [examples, groups, tokens, heads * width]
        _add_products(sums.keys, (rows * weights.clamp_min(0).sqrt()[..., None]).transpose(0, 1).flatten(1, 2))
        sums.tokens[0] += len(received) * self.projections.queries

    def _add_received(self, total: Tensor, shifts: Sequence[Tensor], sign: int = 1) -> None:
        """Adds products of attended values of a group; a shift is the distance of heads."""
        for head in range(self._size):  # whose query heads attend
            received = [shifts[(other - head) % self._size][:, :, head] for other in range(self._size)]
            stacked = torch.stack(received, 3)  # [tokens, groups, query heads, heads, width]
            _add_products(total, stacked.transpose(0, 1).reshape(self._groups, -1, total.shape[1]), sign)

    def _tokens_that_count(self, tensor: Tensor, linear: str) -> Tensor:
        """Returns the non-padding tokens as rows, in float32 or wider."""
        tensor = tensor.flatten(0, -2)
        mask = self.masks().get(linear)
        if mask is not None and mask.numel() == len(tensor):
            tensor = tensor[mask.flatten().clone()]  # autograd may save it, and it may come from inference mode
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def _add_products(total: Tensor, values: Tensor, sign: int = 1) -> None:
    with full_precision():  # whatever the training run has set
        total.add_((values.mT @ values).to(total.device), alpha=sign)
