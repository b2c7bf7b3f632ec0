"""The attentions of a model that are to have fewer KV heads: what their heads are given, and parameters that make them equal."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers.pytorch_utils import Conv1D

from billhook.adapters.merge import MERGE, adapted
from billhook.engine.batches import Loss, Run, run_with_loss, tell_apart
from billhook.engine.comm import ALONE, Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import Together, goes_by_blocks
from billhook.engine.state import overridden, replaced, undisturbed
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.kv_heads.bases import (
    Moments,
    Sums,
    find_bases,
    gather,
    moments_in_order,
    pooled,
    similar_order,
    turned,
    weight_moments,
)
from billhook.kv_heads.freedom import Freedoms, find_freedoms, in_order
from billhook.kv_heads.layout import Stacks, find_projections, read, written
from billhook.kv_heads.methods import Grouping, KVMethod, Rendered
from billhook.linalg import float64_device, in_float64
from billhook.model.linears import size_of
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.tracing.trace import trace

ROWS = 256
"""How many predictions are compared at a time, as float64 takes memory."""


def distance_between(expected: Any, found: Any, tokens: Tensor | None = None) -> float:  # noqa: ANN401 - whatever a model returns
    """Returns the mean Kullback-Leibler divergence of logits, KL(expected || found); without any, a relative mean square.

    Args:
        expected: What the model returns as it is.
        found: What it returns with other weights.
        tokens: Which tokens count, bool, `[batch, length]`; it is for outputs of that shape.
    """
    logits = getattr(expected, "logits", None)
    a, b = ((one.logits if isinstance(logits, Tensor) else _states(one)).detach() for one in (expected, found))
    if tokens is not None and tokens.shape == a.shape[:2]:
        a, b = a[tokens], b[tokens]
    if isinstance(logits, Tensor) and a.dim() > 1 and a.shape[-1] > 1:
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        return sum(_divergences(a, b)) / len(a)
    a, b = in_float64(a), in_float64(b)
    return float((a - b).square().mean() / a.square().mean().clamp_min(torch.finfo(torch.double).tiny))


def _divergences(expected: Tensor, found: Tensor) -> Iterator[float]:
    for first in range(0, len(expected), ROWS):
        p, q = (log_softmax(in_float64(one[first : first + ROWS]), -1) for one in (expected, found))
        yield float(torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum())


def _states(output: Any) -> Tensor:  # noqa: ANN401
    """Returns the first of what a model returns that is of states, or else of numbers: a loss comes before them."""
    numbers = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point()]
    if not numbers:
        raise ValueError(f"batches: the model returns a {type(output).__name__}, which holds no numbers to compare")
    return next((one for one in numbers if one.dim() > 1), numbers[0])


class Attentions:
    """The attentions of a model that are to have fewer KV heads, in `groups` by name, and what is known of them."""

    def __init__(self, model: nn.Module, groups: Mapping[str, int], comm: Comm = ALONE) -> None:
        layers = adapted(model)
        if on := next((name for name in layers if any(name.startswith(f"{place}.") for place in groups)), None):
            why = "heads stay in their bases, where 'mean' and 'first' can pool them"
            raise ValueError(f"with LoRA attached to {on}, {why}: or {MERGE}")
        structure = trace(model)
        self.model, self.groups, self._comm, self.store = model, groups, comm, store_of(model)
        self.places = find_projections(model, structure, groups)
        self.freedoms: dict[str, Freedoms] = find_freedoms(model, self.places)
        downs = [part.name.rpartition(".")[0] for one in structure.feed_forward for part in one.down]
        self.not_refitted = list[str]()  # by the last repair
        self.downs = [name for name in dict.fromkeys(downs) if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]

    def check_adapters(self, repair: RepairConfig | None) -> None:
        """Refuses a repair of a model with adapters, which are none of the heads' but may be on what a repair refits."""
        if repair is not None and (layers := adapted(self.model)):
            raise ValueError(f"repair refits weights, and {next(iter(layers))} has adapters: leave it out, or {MERGE}")

    def check(self, method: Rendered) -> None:
        """Refuses a method where heads cannot change places, or none of their numbers may be mixed."""
        fixed = [name for name, own in self.freedoms.items() if not own.order]
        if method.grouping == "similar" and fixed:
            raise ValueError(
                f"grouping='similar' puts heads in another order, which changes what {fixed[0]} computes (its code knows heads "
                "by their place, as a position bias for each does): 'consecutive' works"
            )
        if method.changes_basis and not any(own.keys or own.values for own in self.freedoms.values()):
            raise ValueError(
                f"method='{method.name}': no change of basis leaves what {next(iter(self.places))} computes as it is (a norm or "
                "a gate stands between its projections and their products): 'mean' works"
            )

    def allowed(self, methods: Sequence[Rendered]) -> list[Rendered]:
        """Returns the methods that suit the attentions; refuses if none does."""
        found, why = list[Rendered](), None
        for method in methods:
            try:
                self.check(method)
                found.append(method)
            except ValueError as error:
                why = error
        if not found and why is not None:
            raise why
        return found

    def trial(self, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
        """Returns a batch, on the model's device, with which tokens count for each linear."""
        linears = {rows.linear for place in self.places.values() for rows in (place.q, place.k, place.v, place.o)}
        names = linears | set(self.downs)
        return run_with_loss(self.model, {name: self.model.get_submodule(name) for name in names}, batch, loss)

    def choosing(self, runs: int, repair: RepairConfig | None = None) -> set[int]:
        """Returns those of this rank's runs that are held out, as they choose a repair's ridge."""
        return (repair or RepairConfig()).choosing(runs, self._comm)

    def summed(self, *numbers: float) -> list[float]:
        """Returns sums over ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=float64_device(self._comm.device))
        found: list[float] = self._comm(sums).tolist()
        return found

    def moments(self, trials: Sequence[Run], grouping: Grouping) -> dict[str, Moments]:
        """Returns the moments that data shows, or where no rank has any, those of the weights."""
        groups = {name: 1 if grouping == "similar" else self.groups[name] for name in self.places}
        if any(self.summed(len(trials))):
            return gather(self.model, self.places, groups, trials, self._comm)
        return {name: self.weight_moments(name, grouping) for name in self.places}

    def weight_moments(self, name: str, grouping: Grouping) -> Moments:
        """Returns the moments that the weights of an attention alone let expect."""
        self.store.load(self.model.get_submodule(name))
        return weight_moments(read(self.model, self.places[name]), 1 if grouping == "similar" else self.groups[name])

    @torch.no_grad()
    def rendered(self, methods: Sequence[Rendered], trials: Sequence[Run]) -> Iterator[tuple[Rendered, LazyTensors]]:
        """Yields for each of some methods, which group heads alike, what `equal` returns on the moments that data shows.

        Where blocks come and go, one pass finds all of them, and moments go with their block. Where ranks share blocks and call
        them in another order than one after the other, the moments of all attentions are there at once.
        """
        if goes_by_blocks(self.model, [trial.visit for trial in trials], self._comm):
            new = self._rendered_blockwise(methods, trials)
            for number, method in enumerate(methods):
                own = {name: read for name, read in new.reads.items() if name.startswith(f"{number} ")}
                yield method, LazyTensors(own).renamed(lambda name: name.partition(" ")[2])
            return
        moments = self.moments(trials, methods[0].grouping)
        for method in methods:
            yield method, self.equal(method, moments)

    def _rendered_blockwise(self, methods: Sequence[Rendered], trials: Sequence[Run]) -> LazyTensors:
        """Returns the parameters of all methods, each behind its number; what an earlier process has found is not found again."""
        store, new, inside = self.store, LazyTensors({}), dict[nn.Module | None, list[str]]()
        for name in self.places:
            inside.setdefault(store.owner.get(self.model.get_submodule(name)), []).append(name)
        with store.step(f"heads of {self.groups} by {methods}", partial(tell_apart, trials)):
            done = {block for block in inside if block is not None and store.known(block) is not None}
            left = [name for block, names in inside.items() if block not in done for name in names]
            passed = _Pass(self, methods[0].grouping, trials, left, self._comm)

            def stage(block: nn.Module | None) -> None:
                nonlocal new
                values = dict[str, Tensor]()
                for name in () if block in done else inside.get(block, ()):
                    moments = passed.moments(name)
                    for number, method in enumerate(methods):
                        equal = by_parameter(self.equal_in(name, method, moments))
                        values |= {f"{number} {parameter}": value for parameter, value in equal.items()}
                if inside.pop(block, None):
                    new |= store.stage(block, values)

            if left and any(self.summed(len(trials))):
                passed.go(Together(self.model, stage, True, self._comm))
            for block in list(inside):  # what no run has come to, which is refused, and what is in no block
                stage(block)
        return new

    def equal(self, method: Rendered, moments: Mapping[str, Moments], pool: bool = True) -> LazyTensors:
        """Returns the parameters with which the heads of each group are equal; without pooling, in one basis."""
        new = LazyTensors({})
        for name, own in moments.items():
            new |= self.store.stage(None, by_parameter(self.equal_in(name, method, own, pool)))
        return new

    def equal_in(self, name: str, method: Rendered, own: Moments, pool: bool = True) -> dict[str, dict[str, Tensor]]:
        """Returns the same of one attention, by linear and by the name in it."""
        self.store.load(self.model.get_submodule(name))
        return written(self.model, self.places[name], self._become(name, method, own, pool))

    def _become(self, name: str, method: Rendered, own: Moments, pool: bool) -> Stacks:
        """Returns what the heads of an attention become."""
        freedom, groups = self.freedoms[name], self.groups[name]
        stacks = read(self.model, self.places[name])
        if method.grouping == "similar":
            order = self._comm.decide(lambda: similar_order(stacks, own, freedom, method, groups))
            stacks, own = in_order(stacks, order), moments_in_order(own, order, groups)
        become = pooled if pool else turned
        return become(stacks, *find_bases(stacks, own, freedom, method))

    def repaired(self, new: LazyTensors, trials: Sequence[Run], repair: RepairConfig) -> LazyTensors:
        """Returns the same, with the linears behind attentions and feed-forwards refitted to what the whole model gives."""
        kept = {name: torch.ones(width, dtype=torch.bool) for name, width in self.widths.items()}
        self.not_refitted.clear()
        return new | repair_linears(self.model, kept, trials, repair, self._comm, given=new, left=self.not_refitted)

    @property
    def widths(self) -> dict[str, int]:
        """How many inputs the linears have that a repair refits: those behind attentions, and those that feed-forwards end in."""
        reading = [place.o.linear for place in self.places.values()] + self.downs
        return {name: size_of(self.model.get_submodule(name))[1] for name in dict.fromkeys(reading)}

    @torch.no_grad()
    def distance(self, new: LazyTensors, trials: Sequence[Run]) -> float:
        """Returns how far the outputs with other parameters are from the model's own, the mean over some batches."""
        last = list(self.places.values())[-1].o.linear
        compared = self._compared_side_by_side if self.store.in_files else self._compared
        distances = [
            fmean(distance_between(*pair, trial.tokens.get(last)) for pair in zip(expected, found, strict=True))
            for trial, expected, found in compared(new, trials)
        ]
        total, count = self.summed(sum(distances), len(trials))
        return float(total / count)

    def _compared(self, new: LazyTensors, trials: Sequence[Run]) -> Iterator[tuple[Run, list[Any], list[Any]]]:
        """Yields each run with the model's own outputs and those with other parameters; all ranks go on until none has any."""
        for number in count():
            mine = trials[number : number + 1]
            if not any(self.summed(len(mine))):
                return
            outputs = list[list[Any]]()
            for values in (LazyTensors({}), new):
                with self.store.computing_with(values), self.store.apart(self._comm):
                    outputs += [self._outputs(trial) for trial in mine]
            for trial in mine:
                yield trial, outputs[0], outputs[1]

    def _outputs(self, trial: Run) -> list[Any]:
        """Returns what the model returns each time that it is called, or else, if only parts of it are, what the run does."""
        outputs = list[Any]()
        with undisturbed(self.model), ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(lambda *own: outputs.append(own[2])).remove)
            result = trial.visit()
        return outputs or [result]

    def _compared_side_by_side(self, new: LazyTensors, trials: Sequence[Run]) -> Iterator[tuple[Run, list[Any], list[Any]]]:
        """Yields the same of a model whose blocks are read once for all runs, with their own parameters and with others."""
        here, outputs = dict[str, dict[str, Tensor]](), dict[int, Any]()  # new parameters of the block that computes
        together = Together(self.model, lambda _: here.clear())

        def changed(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if not together.now % 2:
                return forward(*args, **kwargs)
            if name not in here:
                here[name] = new.of_module(name)
            with replaced({self.model.get_submodule(name): here[name]}):
                return forward(*args, **kwargs)

        def run(trial: Run) -> None:
            outputs[together.now] = trial.visit()

        with undisturbed(self.model), ExitStack() as stack:
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
        tried = [one for one in self.allowed(method.candidates) if one.grouping == "consecutive" or self.may_group]
        return len({one.grouping for one in tried}) + len(tried) * each + each

    def bytes(self, method: KVMethod) -> int:
        """Returns the bytes of the largest moments of an attention, with those that are computed of them."""
        similar, most = any(one.grouping == "similar" for one in method.candidates), 0
        for name, place in self.places.items():
            groups = 1 if similar else self.groups[name]
            keys, values = (place.kv_heads * rows.index.shape[1] for rows in (place.k, place.v))
            most = max(most, groups * ((keys // groups) ** 2 + (values // groups) ** 2))
        return 2 * 8 * most

    @property
    def may_group(self) -> bool:
        """True if there is a choice which heads share a group, and heads may change places."""
        some = any(1 < self.groups[name] < place.kv_heads for name, place in self.places.items())
        return some and all(own.order for own in self.freedoms.values())


class _Pass:
    """One pass of runs over a model as it is, in which each block is left with the moments of its attentions.

    Args:
        attentions: All attentions.
        grouping: Which heads are to share a group.
        trials: The runs; without any, the weights alone say how heads vary.
        names: The attentions to listen to.
        comm: The ranks.
    """

    def __init__(
        self,
        attentions: Attentions,
        grouping: Grouping,
        trials: Sequence[Run],
        names: Collection[str],
        comm: Comm = ALONE,
    ) -> None:
        self.attentions, self.grouping, self.trials, self.names, self.comm = attentions, grouping, trials, names, comm
        self.sums: dict[str, Sums] = {}  # of the attentions that have not been left yet
        self.listeners: dict[str, ExitStack] = {}

    def go(self, together: Together) -> None:
        """Goes over all blocks."""
        with undisturbed(self.attentions.model), ExitStack() as stack:
            for name in self.names:
                self.listeners[name] = stack.enter_context(ExitStack())
                self._listen(name, together)
            together([run.visit for run in self.trials])

    def _listen(self, name: str, together: Together) -> None:
        """Listens to an attention from its first call until its block is left, as what is added up takes memory."""
        module = self.attentions.model.get_submodule(name)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
            if name not in self.sums:
                self.sums[name] = self._sums(name)
                self.listeners[name].enter_context(self.sums[name].listening())
                return module.forward(*args, **kwargs)
            self.sums[name].masks = self.trials[together.now].tokens
            return inner(*args, **kwargs)

        self.listeners[name].enter_context(overridden(module, forward=partial(forward, module.forward)))

    def _sums(self, name: str) -> Sums:
        own = self.attentions
        return Sums(own.model, own.places[name], [1 if self.grouping == "similar" else own.groups[name]])

    def moments(self, name: str) -> Moments:
        """Returns the moments of an attention, whose block has been left, and lets go of what they were added up in."""
        if name not in self.listeners:
            return self.attentions.weight_moments(name, self.grouping)
        self.listeners.pop(name).close()
        sums = self.sums.pop(name, None) or self._sums(name)
        self.comm.sum_(*sums.tensors())
        (moments,) = sums.moments().values()
        return moments
