"""Makes a model ready for fewer KV heads: weights with which the heads of a group are equal, by any method, repaired if asked."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.adapters.beneath import MERGE, adapted
from billhook.engine.batches import Loss, Run, run_with_loss
from billhook.engine.state import undisturbed
from billhook.engine.store import bring
from billhook.engine.walk import Reduce
from billhook.kv_heads.bases.bases import find_bases, pooled, turned, weight_moments
from billhook.kv_heads.bases.distance import distance_between
from billhook.kv_heads.bases.freedom import Freedoms, find_freedoms, in_order
from billhook.kv_heads.bases.grouping import moments_in_order, similar_order
from billhook.kv_heads.bases.moments import Moments, gather
from billhook.kv_heads.bases.stacks import Stacks, find_projections, instead, read, written
from billhook.kv_heads.methods.base import Grouping, KVMethod, Rendered
from billhook.linalg import float64_device
from billhook.model.linears import size_of
from billhook.model.plan import Weights
from billhook.repairs.enough import not_refitted
from billhook.repairs.in_turn import Refitted, by_parameter
from billhook.repairs.repair import Repair, repair_linears
from billhook.repairs.visitor import Given
from billhook.tracing.trace import trace

BatchAndLoss = tuple[Any, Loss | None]
"""A batch and, from the model and it, the loss; None for the model's own."""


class Attentions:
    """The attentions of a model that are to have fewer KV heads, in `groups` by name, and what is known of them."""

    def __init__(self, model: nn.Module, groups: Mapping[str, int], reduce: Reduce | None = None) -> None:
        layers = adapted(model)
        if on := next((name for name in layers if any(name.startswith(f"{place}.") for place in groups)), None):
            why = "heads stay in their bases, where 'mean' and 'first' can pool them"
            raise ValueError(f"with LoRA attached to {on}, {why}: or {MERGE}")
        structure = trace(model)
        self.model, self.groups, self._reduce = model, groups, reduce
        self.places = find_projections(model, structure, groups)
        self.freedoms: dict[str, Freedoms] = find_freedoms(model, self.places)
        downs = [part.name.rpartition(".")[0] for one in structure.feed_forward for part in one.down]
        self.not_refitted = list[str]()  # by the last repair
        self.downs = [name for name in dict.fromkeys(downs) if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]

    def check_adapters(self, repair: Repair | None) -> None:
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

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def choosing(self, runs: int, repair: Repair | None = None) -> set[int]:
        """Returns those of this rank's runs that are held out, as they choose a repair's ridge."""
        return (repair or Repair()).choosing(runs, self._reduce, self._device)

    def summed(self, *numbers: float) -> list[float]:
        """Returns sums over ranks."""
        sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=float64_device(self._device))
        found: list[float] = (sums if self._reduce is None else self._reduce(sums)).tolist()
        return found

    def moments(self, trials: Sequence[Run], grouping: Grouping) -> dict[str, Moments]:
        """Returns the moments that data shows, or where no rank has any, those of the weights."""
        groups = {name: 1 if grouping == "similar" else self.groups[name] for name in self.places}
        if any(self.summed(len(trials))):
            return gather(self.model, self.places, groups, trials, self._reduce)
        return {name: self.weight_moments(name, grouping) for name in self.places}

    def weight_moments(self, name: str, grouping: Grouping) -> Moments:
        """Returns the moments that the weights of an attention alone let expect."""
        bring(self.model, self.model.get_submodule(name))
        return weight_moments(read(self.model, self.places[name]), 1 if grouping == "similar" else self.groups[name])

    def rendered(self, methods: Sequence[Rendered], trials: Sequence[Run]) -> Iterator[tuple[Rendered, Given]]:
        """Yields for each of some methods, which group heads alike, what `equal` returns on the moments that data shows."""
        moments = self.moments(trials, methods[0].grouping)
        for method in methods:
            yield method, self.equal(method, moments)

    def equal(self, method: Rendered, moments: Mapping[str, Moments], pool: bool = True) -> Given:
        """Returns by linear the parameters with which the heads of each group are equal; without pooling, in one basis."""
        new: dict[str, dict[str, Tensor]] = {}
        for name, own in moments.items():
            new |= self.equal_in(name, method, own, pool)
        return new

    def equal_in(self, name: str, method: Rendered, own: Moments, pool: bool = True) -> dict[str, dict[str, Tensor]]:
        """Returns the same of one attention."""
        bring(self.model, self.model.get_submodule(name))
        return written(self.model, self.places[name], self._become(name, method, own, pool))

    def _become(self, name: str, method: Rendered, own: Moments, pool: bool) -> Stacks:
        """Returns what the heads of an attention become."""
        freedom, groups = self.freedoms[name], self.groups[name]
        stacks = read(self.model, self.places[name])
        if method.grouping == "similar":
            order = similar_order(stacks, own, freedom, method, groups)
            stacks, own = in_order(stacks, order), moments_in_order(own, order, groups)
        become = pooled if pool else turned
        return become(stacks, *find_bases(stacks, own, freedom, method))

    def repaired(self, new: Given, trials: Sequence[Run], repair: Repair) -> Given:
        """Returns the same, with the linears behind attentions and feed-forwards refitted to what the whole model gives."""
        found = self._refitted(new, trials, repair)
        assert isinstance(found, dict), "the blocks of the model come and go"
        return {name: dict(parameters) for name, parameters in new.items()} | self.parameters(found)

    def parameters(self, refitted: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, dict[str, Tensor]]:
        """Names the weight and bias of each refitted linear as the linear does."""
        return {name: {"weight": weight} | ({} if bias is None else {"bias": bias}) for name, (weight, bias) in refitted.items()}

    def weights(self, new: Given) -> Weights:
        """Returns new values by parameter, as the model names them."""
        return by_parameter(new)

    def _refitted(self, new: Given, trials: Sequence[Run], repair: Repair) -> dict[str, tuple[Tensor, Tensor | None]] | Refitted:
        """Refits the linears behind attentions and feed-forwards, where others are new."""
        kept = {name: torch.ones(width, dtype=torch.bool) for name, width in self.widths.items()}
        self.not_refitted.clear()
        return repair_linears(self.model, kept, trials, repair, self._reduce, given=new, left=self.not_refitted)

    @property
    def widths(self) -> dict[str, int]:
        """How many inputs the linears have that a repair refits: those behind attentions, and those that feed-forwards end in."""
        reading = [place.o.linear for place in self.places.values()] + self.downs
        return {name: size_of(self.model.get_submodule(name))[1] for name in dict.fromkeys(reading)}

    @torch.no_grad()
    def distance(self, new: Given, trials: Sequence[Run]) -> float:
        """Returns how far the outputs with other parameters are from the model's own, the mean over some batches."""
        last, total = list(self.places.values())[-1].o.linear, 0.0
        for trial, expected, found in self.compared(new, trials):
            each = [distance_between(*pair, trial.tokens.get(last)) for pair in zip(expected, found, strict=True)]
            total += sum(each) / len(each)
        total, count = self.summed(total, len(trials))
        return float(total / count)

    def compared(self, new: Given, trials: Sequence[Run]) -> Iterator[tuple[Run, list[Any], list[Any]]]:
        """Yields each run with the model's own outputs and those with other parameters."""
        for trial in trials:
            yield trial, self._outputs({}, trial), self._outputs(new, trial)

    def _outputs(self, new: Given, trial: Run) -> list[Any]:
        """Returns what the model returns each time that it is called, or else, if only parts of it are, what the run does."""
        found = list[Any]()
        with undisturbed(self.model), instead(self.model, new), ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(lambda *own: found.append(own[2])).remove)
            given = trial.visit()
        return found or [given]


def best_method(
    attentions: Attentions, methods: Sequence[Rendered], trials: Sequence[Run], repair: Repair | None = None
) -> tuple[Rendered, dict[Rendered, float]]:
    """Finds the allowed method that stays nearest to the model's outputs on held-out batches, and how far away each of them is.

    The loss would not do: it varies by chance more than an exact method and one that is nearly so differ.

    Those batches are held out that choose a repair's ridge; each method is repaired before it is compared, where there is more
    than one batch besides.
    """
    choosing = attentions.choosing(len(trials), repair)
    held, besides = attentions.summed(len(choosing), len(attentions.choosing(len(trials) - len(choosing), repair)))
    if not held:
        raise ValueError(f"batches: 'auto' needs 2 at least, as some are held out; got {len(trials)} here")
    seen = [trial for number, trial in enumerate(trials) if number not in choosing]
    held_out = [trial for number, trial in enumerate(trials) if number in choosing]
    distances: dict[Rendered, float] = {}
    for grouping, alike in groupby(attentions.allowed(methods), lambda method: method.grouping):
        if grouping == "similar" and not may_group(attentions):
            continue
        for method, new in attentions.rendered(list(alike), seen):
            if repair is not None and besides:
                new = attentions.repaired(new, seen, repair)
            distances[method] = attentions.distance(new, held_out)
    return min(distances, key=lambda method: math.inf if math.isnan(distances[method]) else distances[method]), distances


def may_group(attentions: Attentions) -> bool:
    """Returns whether there is a choice which heads share a group, and heads may change places."""
    some = any(1 < attentions.groups[name] < place.kv_heads for name, place in attentions.places.items())
    return some and all(own.order for own in attentions.freedoms.values())


def made_equal(
    attentions: Attentions, method: KVMethod, batches: Iterable[BatchAndLoss], repair: Repair | None
) -> tuple[Given, str]:
    """Returns by linear the parameters with which the heads of each group are equal, and how they came to be.

    Args:
        attentions: What is known of the attentions.
        method: How heads become equal; of several `candidates` the best on held-out batches.
        batches: Batches, each with its loss (None for the model's own).
        repair: If given, what reads the heads, and the feed-forwards, are refitted to what the whole model gives.
    """
    attentions.check_adapters(repair)
    chosen, *others = attentions.allowed(method.candidates)
    trials = [attentions.trial(*pair) for pair in batches]
    least, what = batches_needed(method, repair)
    (number,) = attentions.summed(len(trials))
    if number < least:
        why = "as some are held out" if least > 1 else "to see what the heads are given"
        raise ValueError(f"batches: {what} needs {least} at least, {why}; got {number:g}")
    if len(method.candidates) > 1:
        chosen, _ = best_method(attentions, [chosen, *others], trials, repair)
    ((_, new),) = attentions.rendered([chosen], trials)
    if repair is not None:
        new = attentions.repaired(new, trials, repair)
    how = f"{method}: {chosen}" if len(method.candidates) > 1 else str(method)
    if repair is not None:
        how = "; ".join([f"{how}, repaired", *filter(None, [not_refitted(attentions.not_refitted)])])
    return new, how


def batches_needed(method: KVMethod, repair: Repair | None) -> tuple[int, str]:
    """Returns how many batches are needed at least, and what needs them, in words."""
    if repair is not None and method.least_batches < 2:
        return 2, "repair"
    return method.least_batches, f"method='{method.name}'"


def check_ready(model: nn.Module, groups: Mapping[str, int], method: KVMethod, repair: Repair | None = None) -> Attentions:
    """Returns the attentions of a model; refuses one whose heads none of a method's candidates can make ready for fewer."""
    found = Attentions(model, groups)
    found.allowed(method.candidates)
    found.check_adapters(repair)
    return found
