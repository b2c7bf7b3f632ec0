"""The attention modules to convert to fewer KV heads.

Statistics of their heads, and weights that make heads equal.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count, product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from billhook.adapters.merge import MERGE_HINT, adapter_layers
from billhook.engine.batches import Loss, Run, run_with_loss, runs_fingerprint
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import SideBySide, runs_blockwise
from billhook.engine.state import evaluating_without_grad, overridden, replaced
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.kv_heads.basis import find_bases, in_bases, pooled, similar_order
from billhook.kv_heads.layout import HeadTensors, Projections, find_projections, read, written
from billhook.kv_heads.methods import Grouping, KVMethod, Reconstructing
from billhook.kv_heads.moments import MomentPass, Moments, gather, weight_moments
from billhook.kv_heads.symmetry import find_symmetries, in_order
from billhook.linalg import float64_device, in_float64
from billhook.model.layers import is_linear, size_of
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.tracing.trace import trace

ROWS = 256
"""Number of predictions to compare at a time, as float64 takes memory."""

Compared = Iterator[tuple[Run, list[Any], list[Any]]]
"""Runs, with the model's outputs before and after a change of weights."""


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
        a, b = a[tokens], b[tokens]
    if has_logits and a.dim() > 1 and a.shape[-1] > 1:
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        return sum(map(_divergence, a.split(ROWS), b.split(ROWS))) / len(a)
    a, b = in_float64(a), in_float64(b)
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


class Attentions:
    """The attention modules to convert, with their number of groups and their symmetries."""

    def __init__(self, model: nn.Module, groups: Mapping[str, int], comm: Comm = SINGLE_PROCESS) -> None:
        for layer, name in product(adapter_layers(model), groups):
            if layer.startswith(f"{name}."):
                why = "heads stay in their bases, where 'mean' and 'first' can pool them without a repair"
                raise ValueError(f"model: with LoRA attached to {layer}, {why}: or {MERGE_HINT}")
        structure = trace(model)
        self.model, self.groups, self._comm, self.store = model, groups, comm, store_of(model)
        self.projections = find_projections(model, structure, groups)
        self.symmetries = find_symmetries(model, self.projections)
        downs = dict.fromkeys(part.name.rpartition(".")[0] for ffn in structure.feed_forward for part in ffn.down)
        self.downs = [name for name in downs if is_linear(model.get_submodule(name))]
        self.not_refitted = list[str]()  # by the last repair

    def check_adapters(self, repair: RepairConfig | None) -> None:
        """Raises a ValueError for a repair of a model with adapters."""
        if repair is not None and (layers := adapter_layers(self.model)):
            raise ValueError(f"repair refits weights, and {next(iter(layers))} has adapters: leave it out, or {MERGE_HINT}")

    def check(self, method: Reconstructing) -> None:
        """Raises a ValueError if the method needs an unsupported reordering or change of basis."""
        fixed = [name for name, symmetries in self.symmetries.items() if not symmetries.order]
        if method.grouping == "similar" and fixed:
            raise ValueError(
                f"grouping='similar' reorders heads, which changes the output of {fixed[0]} (its code depends on "
                "the position of each head). Use grouping='consecutive'."
            )
        if method.changes_basis and not any(symmetries.keys or symmetries.values for symmetries in self.symmetries.values()):
            raise ValueError(
                f"method='{method.name}': no change of basis preserves the output of {next(iter(self.projections))} (a "
                "norm or a gate follows its projections): 'mean' works"
            )

    def allowed(self, methods: Sequence[Reconstructing]) -> list[Reconstructing]:
        """Returns the methods that suit the attention modules.

        Raises a ValueError if there are none.
        """
        allowed, refusal = list[Reconstructing](), None
        for method in methods:
            try:
                self.check(method)
                allowed.append(method)
            except ValueError as error:
                refusal = error
        if not allowed and refusal is not None:
            raise refusal
        return allowed

    def trial(self, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
        """Returns a run of a batch, with the non-padding tokens of each linear layer."""
        names = {linear for attention in self.projections.values() for linear in attention.linears} | set(self.downs)
        return run_with_loss(self.model, {name: self.model.get_submodule(name) for name in names}, batch, loss)

    def choosing(self, runs: int, repair: RepairConfig | None = None) -> set[int]:
        """Returns the indices of this rank's runs that are held out to choose a ridge penalty."""
        return (repair or RepairConfig()).choosing(runs, self._comm)

    def summed(self, *numbers: float) -> list[float]:
        """Returns sums over ranks."""
        sums: list[float] = self._comm(
            torch.tensor(numbers, dtype=torch.float64, device=float64_device(self._comm.device))
        ).tolist()
        return sums

    def moments(self, trials: Sequence[Run], grouping: Grouping) -> dict[str, Moments]:
        """Returns the Gram matrices of heads on data, or of the weights if no rank has data."""
        groups = self._seen_in(grouping)
        numbers = {name: [number] for name, number in groups.items()}
        of_data = gather(self.model, self.projections, numbers, trials, self._comm) if any(self.summed(len(trials))) else {}
        return {name: of_data[name][groups[name]] if of_data else self._weight_moments(name, groups[name]) for name in groups}

    def _seen_in(self, grouping: Grouping) -> dict[str, int]:
        """Returns the number of groups for the statistics.

        One if the method chooses which heads share a group.
        """
        return {name: 1 if grouping == "similar" else self.groups[name] for name in self.projections}

    def _weight_moments(self, name: str, groups: int) -> Moments:
        self.store.load(self.model.get_submodule(name))
        return weight_moments(read(self.model, self.projections[name]), groups)

    @torch.no_grad()
    def reconstructed(
        self, methods: Sequence[Reconstructing], trials: Sequence[Run]
    ) -> Iterator[tuple[Reconstructing, LazyTensors]]:
        """Yields for each method the parameters with equal heads in each group.

        If blocks are streamed, one pass serves all methods, and statistics are dropped with their block. If ranks share blocks
        and call them out of order, the statistics of all attention modules are in memory at once.
        """
        if not runs_blockwise(self.model, [trial.visit for trial in trials], self._comm):
            moments = self.moments(trials, methods[0].grouping)
            for method in methods:
                yield method, self.equal(method, moments)
            return
        new = self._by_block(methods, trials).reads
        for number, method in enumerate(methods):
            prefix = f"{number} "
            yield method, LazyTensors({name.removeprefix(prefix): new[name] for name in new if name.startswith(prefix)})

    def _by_block(self, methods: Sequence[Reconstructing], trials: Sequence[Run]) -> LazyTensors:
        """Returns the parameters of all methods, prefixed by their index.

        Results of an interrupted process are reused.
        """
        store, groups, inside = self.store, self._seen_in(methods[0].grouping), defaultdict[nn.Module | None, list[str]](list)
        for name in self.projections:
            inside[store.owner.get(self.model.get_submodule(name))].append(name)
        new = LazyTensors({})
        with store.step(f"heads of {self.groups} by {methods}", partial(runs_fingerprint, trials)):
            known, left = set[nn.Module](), dict[str, Projections]()
            for block, names in inside.items():
                if block is not None and store.staged(block) is not None:
                    known.add(block)
                else:
                    left |= {name: self.projections[name] for name in names}
            listening = MomentPass(self.model, left, {name: [groups[name]] for name in left}, trials, self._comm)
            has_data = bool(left) and any(self.summed(len(trials)))

            def stage(block: nn.Module | None) -> None:
                nonlocal new
                names, values = inside.pop(block, []), dict[str, Tensor]()
                for name in names if block not in known else ():
                    of_data = listening.take(name)[name] if has_data else {}
                    moments = of_data.get(groups[name]) or self._weight_moments(name, groups[name])
                    for number, method in enumerate(methods):
                        equal = by_parameter(self.equal_in(name, method, moments))
                        values |= {f"{number} {parameter}": value for parameter, value in equal.items()}
                if names:
                    new |= store.stage(block, values)

            if has_data:
                listening.run(SideBySide(self.model, stage, True, self._comm))
            for block in list(inside):  # what no run has come to, which is refused, and what is in no block
                stage(block)
        return new

    def equal(self, method: Reconstructing, moments: Mapping[str, Moments], pool: bool = True) -> LazyTensors:
        """Returns parameters with equal heads in each group.

        Without pooling, heads in a common basis.
        """
        new = LazyTensors({})
        for name, of_heads in moments.items():
            new |= self.store.stage(None, by_parameter(self.equal_in(name, method, of_heads, pool)))
        return new

    def equal_in(self, name: str, method: Reconstructing, moments: Moments, pool: bool = True) -> dict[str, dict[str, Tensor]]:
        """Returns the same for an attention module, by linear layer and parameter name."""
        self.store.load(self.model.get_submodule(name))
        return written(self.model, self.projections[name], self._equal_heads(name, method, moments, pool))

    def _equal_heads(self, name: str, method: Reconstructing, moments: Moments, pool: bool) -> HeadTensors:
        """Returns equal heads in float64, and frees copies of the old values."""
        symmetries, groups = self.symmetries[name], self.groups[name]
        tensors = read(self.model, self.projections[name])
        if method.grouping == "similar":
            # all ranks take the order of the first, as that follows from floats
            order = self._comm.decide(lambda: similar_order(tensors, moments, symmetries, method, groups))
            tensors, moments = in_order(tensors, order), moments.in_order(order, groups)
        become = pooled if pool else in_bases
        return become(tensors, *find_bases(tensors, moments, symmetries, method))

    def repaired(self, new: LazyTensors, trials: Sequence[Run], repair: RepairConfig) -> LazyTensors:
        """Returns the parameters with refitted output layers of attention and MLP modules."""
        kept = {name: torch.ones(width, dtype=torch.bool) for name, width in self.widths.items()}
        self.not_refitted.clear()
        return new | repair_linears(self.model, kept, trials, repair, self._comm, new_params=new, left=self.not_refitted)

    @property
    def widths(self) -> dict[str, int]:
        """Number of inputs of the layers that a repair refits.

        The output layers of attention and MLP modules.
        """
        readers = [attention.o.linear for attention in self.projections.values()]
        return {name: size_of(self.model.get_submodule(name))[1] for name in dict.fromkeys([*readers, *self.downs])}

    @torch.no_grad()
    def distance(self, new: LazyTensors, trials: Sequence[Run]) -> float:
        """Returns the mean distance of outputs with other parameters from the unchanged model's."""
        *_, last = self.projections.values()
        compared = self._compared_side_by_side if self.store.in_files else self._compared
        distances = list[float]()
        for trial, expected, other in compared(new, trials):
            between = partial(distance_between, tokens=trial.tokens.get(last.o.linear))
            distances.append(fmean(between(*pair) for pair in zip(expected, other, strict=True)))
        total, number = self.summed(sum(distances), len(trials))
        return float(total / number)

    def _compared(self, new: LazyTensors, trials: Sequence[Run]) -> Compared:
        """Yields each run with its outputs before and after.

        All ranks continue until none has a run left.
        """
        for number in count():
            trial = trials[number : number + 1]
            if not any(self.summed(len(trial))):
                return
            outputs = list[list[Any]]()
            for values in (LazyTensors({}), new):
                with self.store.computing_with(values), self.store.independently(self._comm):
                    outputs += map(self._outputs, trial)
            if trial:
                yield trial[0], outputs[0], outputs[1]

    def _outputs(self, trial: Run) -> list[Any]:
        """Returns the outputs of each call of the model, or else the output of the run."""
        outputs = list[Any]()
        with evaluating_without_grad(self.model), ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(lambda _module, _args, output: outputs.append(output)).remove)
            result = trial.visit()
        return outputs or [result]

    def _compared_side_by_side(self, new: LazyTensors, trials: Sequence[Run]) -> Compared:
        """Yields the same for a streamed model, with a single read of its blocks."""
        of_block, outputs = dict[str, dict[str, Tensor]](), dict[int, Any]()  # new parameters of the block that computes
        together = SideBySide(self.model, lambda _: of_block.clear())

        def changed(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if not together.run % 2:  # which has the model's own parameters
                return forward(*args, **kwargs)
            if name not in of_block:
                of_block[name] = new.of_module(name)
            with replaced({self.model.get_submodule(name): of_block[name]}):
                return forward(*args, **kwargs)

        def run(trial: Run) -> None:
            outputs[together.run] = trial.visit()

        with evaluating_without_grad(self.model), ExitStack() as stack:
            for name in new.modules:
                linear = self.model.get_submodule(name)
                stack.enter_context(overridden(linear, forward=partial(changed, name, linear.forward)))
            together([partial(run, trial) for trial in trials for _ in range(2)])
        for number, trial in enumerate(trials):
            yield trial, [outputs.pop(2 * number)], [outputs.pop(2 * number + 1)]

    def passes(self, method: KVMethod, repair: RepairConfig | None) -> int:
        """Returns how often the blocks of a model in files are read until heads are equal."""
        each = 1 if repair is None else 3  # one to see what is called, one to refit
        if len(method.candidates) == 1:
            return each
        groupings = [m.grouping for m in self.allowed(method.candidates) if m.grouping == "consecutive" or self.may_group]
        return len(set(groupings)) + len(groupings) * each + each

    def bytes(self, method: KVMethod) -> int:
        """Returns the bytes of the largest Gram matrices of an attention module."""
        groups = self._seen_in("similar" if any(m.grouping == "similar" for m in method.candidates) else "consecutive")
        largest = 0
        for name, attention in self.projections.items():
            number, sizes = groups[name], (attention.k.index.size, attention.v.index.size)
            largest = max(largest, sum(number * (size // number) ** 2 for size in sizes))
        return 2 * 8 * largest

    @property
    def may_group(self) -> bool:
        """True if there is a choice which heads share a group, and heads may change places."""
        some = any(1 < self.groups[name] < attention.kv_heads for name, attention in self.projections.items())
        return some and all(symmetries.order for symmetries in self.symmetries.values())
