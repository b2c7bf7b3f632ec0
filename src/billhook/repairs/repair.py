"""Refits the linears that read removed units, so that they make up for them.

Linear after linear is refitted, as the model calls them, each on its inputs once all before it have lost inputs and been
refitted. Its target is its part of the whole model's stream: where the outputs of linears are added up, as in a residual
stream, it also makes up for what those before it still owe (`residual_order`).
"""

import hashlib
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.arguments import check_fraction, check_types
from billhook.calibration.calibration import log_single_source
from billhook.engine.batches import Run, runs_fingerprint
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import activation_files, spilled_outputs, watch_call_order
from billhook.engine.state import evaluating_without_grad, replaced
from billhook.engine.store import store_of
from billhook.engine.walk import Site, Walk, find_sites
from billhook.model.layers import size_of
from billhook.progress import OnProgress
from billhook.repairs.residuals import NoRepair, check_tokens, not_refitted_message, too_few_tokens
from billhook.repairs.visitor import LinearCalls, RepairVisitor, combine_calls, record_calls, residual_order


@dataclass(frozen=True)
class RepairConfig:
    """How the linears that read removed units are refitted; the defaults did best in experiments without training.

    Fitted to one kind of text alone, a language model may do worse on others: calibrate it on a `Calibration` of several
    sources, `"generated"` among them, which is what it writes itself. Where it is not, the logger `billhook` says so, once.
    Weights that are zero stay zero: a pruned model stays as sparse as it was.

    Args:
        compensate: Whether a linear also makes up for what those before it have lost of the stream that it adds to. It takes a
            second run of each batch, of the whole model.
        held_out: Share of the calibration batches, of all ranks together, that choose the ridge, at least one; in (0, 1). Where
            batches are of several sources (see `Calibration`), each source is held out in turn instead.
        ridges: Candidates for the ridge, each a share of every input's own mean square (or variance, where there is a bias).

    Raises:
        ValueError: If the share is not between 0 and 1, or there is no ridge or one that is not at least 0.0001.

    Example:
        >>> RepairConfig(compensate=False, ridges=[0.1, 1.0])
        RepairConfig(compensate=False, held_out=0.2, ridges=[0.1, 1.0])
    """

    compensate: bool = True
    held_out: float = 0.2
    ridges: Sequence[float] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

    def __post_init__(self) -> None:
        check_types(RepairConfig, vars(self))
        check_fraction("held_out", self.held_out, "(0, 1)")
        if not self.ridges or not all(1e-4 <= ridge < math.inf for ridge in self.ridges):
            raise ValueError(f"ridges={self.ridges!r} must be finite numbers of at least 0.0001, one or more")

    def chooses(self, runs: int) -> set[int]:
        """Returns the runs that choose the ridge: spread evenly over all, and never all."""
        number = min(max(1, round(self.held_out * runs)), runs - 1)
        return {(2 * chosen + 1) * runs // (2 * number) for chosen in range(number)}

    def choosing(self, runs: int, comm: Comm) -> set[int]:
        """Returns those of this rank's runs that choose the ridge, which are chosen among the runs of all ranks."""
        count, numbers = comm.batch_numbers(comm.gather(runs))
        chosen = self.chooses(count)
        return {run for run, number in enumerate(numbers) if number in chosen}

    def parts(self, sources: Sequence[str], comm: Comm = SINGLE_PROCESS) -> tuple[list[int], list[int]]:
        """Returns the part of the data that each run belongs to, and the parts that are held out, in turn.

        Parts are the sources of all ranks' runs. Where there is one alone, they are the runs that choose the ridge, and
        those that do not.

        Raises:
            NoRepair: If no run is left to fit to, or to choose the ridge.
        """
        ranks = comm.gather(list(sources))
        names = sorted({source for of_rank in ranks for source in of_rank}, key=lambda source: zlib.crc32(source.encode()))
        if len(names) > 1:
            return [names.index(source) for source in sources], list(range(len(names)))
        count, numbers = comm.batch_numbers([len(of_rank) for of_rank in ranks])
        if not (chosen := self.chooses(count)):
            count = sum(map(len, ranks))
            raise NoRepair(f"batches: a refit needs two at least, as some are to choose the ridge; got {count} in all")
        return [int(number in chosen) for number in numbers], [1]


def repair_linears(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    trials: Sequence[Run],
    repair: RepairConfig | None = None,
    comm: Comm = SINGLE_PROCESS,
    given: LazyTensors | None = None,
    progress: OnProgress | None = None,
    left: list[str] | None = None,
) -> LazyTensors:
    """Refits linears that lose some of their inputs, and returns the new weights; the model stays as it is.

    In addition to the model, memory holds: the new weights; of every batch, what its run (or two) of the model holds while it
    waits before a linear for the others, and what its streams owe; and, of one linear at a time, in float64, for each part of
    the data half of a square of its kept inputs and a matrix like its weight, and another half of a square to solve in. All but
    this half may rest in files (`BlockStore.rests`). Where one of the linears is called several times in a run, there is no
    catching up. The new weights of a model that is streamed are written, block by block, and come from there; those of one that
    ranks share become shards. Where it does not call its blocks one after the other, all of them are gathered for it.

    Args:
        model: The model.
        kept: By linear (`nn.Linear` or `Conv1D`), which of its inputs are kept: bool, `[in_features]`. One that keeps all is
            refitted, too, where it can catch up, or other parameters are given.
        trials: The batches, two at least on all ranks together, of which some choose the ridge; a rank may have none.
        repair: The settings; `RepairConfig()` by default.
        comm: The ranks, each of which has batches of its own.
        given: Other parameters that linears are to have, refitted or not, as they lie in memory; with them each refitted
            linear makes up for what it then falls short of in the whole model, which keeps its own.
        progress: Is called with how many linears are done, and of how many.
        left: Is given the names of linears that were not refitted.

    Returns:
        By the names of parameters, the weight of each linear, zero for removed inputs, and its bias, if any: in its own dtype and
        layout. One with fewer tokens than kept inputs is not refitted, and a warning names it.

    Raises:
        ValueError: If masks, batches, inputs or given parameters do not fit, or one of these is called more than once in a run.
    """
    repair = repair or RepairConfig()
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    linears = _check(model, kept, every)
    forwards, sources = [trial.visit for trial in trials], [trial.source for trial in trials]
    store, with_others = store_of(model), set(given.modules if given is not None else ())
    parts, held_out = repair.parts(sources, comm)
    log_single_source(model, sources)
    with evaluating_without_grad(model):
        shown, orderly = _shown(model, every, forwards, comm)
        often = {name: linear for name, linear in linears.items() if shown.calls[name] > 1}
        before = residual_order(shown, linears.keys() | with_others) if repair.compensate and not often else {}
        if given is not None:  # each owes at least what it gave in the whole model
            _check_given(given, every, shown.calls, often)
            before = dict.fromkeys(linears) | before
        looked = {name: linear for name, linear in every.items() if name in {*before, *with_others, *linears}}
        visitor = RepairVisitor(looked, kept, before, trials, repair.ridges, parts, held_out, comm, given, progress, store)
        forwards = forwards * (2 if before else 1)
        if not store.holds_all and orderly and not often:
            masks = hashlib.sha256(str([(name, keep.tolist()) for name, keep in kept.items()]).encode()).hexdigest()
            step = store.step(f"{repair} {sources} {masks}", partial(runs_fingerprint, trials))
            with step, activation_files(store) as visitor.files, spilled_outputs(visitor.files, model):
                new = _refit(model, visitor, looked, {}, comm, forwards, by_block=True)
        else:
            store.check_can_hold_all(f"repair: {', '.join(list(often)[:1])} is called several times in a run")
            with store.all_loaded():
                with evaluating_without_grad(model):
                    check_tokens(linears, {name: int(keep.sum()) for name, keep in kept.items()}, trials, comm)
                new = _refit(model, visitor, looked, often, comm, forwards, by_block=False)
    if all(visitor.left.values()):
        raise NoRepair(too_few_tokens(next(iter(visitor.left))))
    names = [name for name, is_left in visitor.left.items() if is_left]
    if names:
        warnings.warn(not_refitted_message(names), stacklevel=2)
    if left is not None:
        left += names
    return new


def _shown(
    model: nn.Module,
    every: Mapping[str, nn.Module],
    forwards: Sequence[Callable[[], object]],
    comm: Comm,
) -> tuple[LinearCalls, bool]:
    """Runs a model once; returns how its linears are called, and whether its blocks are one after the other, on all ranks."""
    store = store_of(model)
    with store.apart(comm), watch_call_order(store, model) as passed:
        shown = [record_calls(every, forward) for forward in forwards[:1]]
    ranks = comm.gather((shown, passed.orderly))
    return combine_calls([linears for shown, _ in ranks for linears in shown]), all(orderly for _, orderly in ranks)


def _refit(
    model: nn.Module,
    visitor: RepairVisitor,
    looked: Mapping[str, nn.Module],
    often: Mapping[str, nn.Module],
    comm: Comm,
    forwards: Sequence[Callable[[], object]],
    by_block: bool,
) -> LazyTensors:
    """Refits linears, first those that are called often in a run; up to the last block that has any, where blocks come and go."""
    visitor.take(visitor.inside(None) if by_block else looked)
    refitted = [name for name in looked if name in visitor.left]
    if often:
        with replaced({looked[name]: visitor.own(name) for name in refitted}):
            Walk([Site(model, dict(often))], visitor, comm)(forwards)
    if once := {name: linear for name, linear in looked.items() if name not in often}:
        sites = find_sites(model, once, "layer", store_of(model).blocks.values() if by_block else ())
        last = max(number for number, site in enumerate(sites) if site.linears)
        visitor.untouched = range(len(forwards) // 2, len(forwards)) if visitor.catches_up else ()
        with replaced({linear: visitor.own(name) for name, linear in often.items()}):
            Walk(sites[: last + 1], visitor, comm, visitor.enter if by_block else None)(forwards)
    return visitor.finish() if by_block else LazyTensors.of(by_parameter({name: visitor.own(name) for name in refitted}))


def _check(model: nn.Module, kept: Mapping[str, Tensor], every: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the linears, in the order of the model's modules, if the masks fit them."""
    for name, keep in kept.items():
        if name not in every:
            kind = type(dict(model.named_modules()).get(name)).__name__.replace("NoneType", "nothing")
            raise ValueError(f"kept: {name!r} is {kind} in {type(model).__name__}, not an nn.Linear or Conv1D")
        _, width = size_of(every[name])
        if keep.dtype != torch.bool or keep.shape != (width,) or not keep.any():
            raise ValueError(
                f"kept[{name!r}] must be bool of shape [{width}] and keep an input at least, got {keep.dtype} of shape "
                f"{list(keep.shape)}, {int(keep.sum())} kept"
            )
    if not kept:
        raise ValueError("kept: no linear is named")
    return {name: linear for name, linear in every.items() if name in kept}


def _check_given(given: LazyTensors, every: Mapping[str, nn.Module], calls: Mapping[str, int], often: Collection[str]) -> None:
    if unknown := [name for name in given.modules if name not in every]:
        raise ValueError(f"given: {unknown[0]!r} is no nn.Linear or Conv1D of the model")
    for name in given.modules:
        sizes = {part: list(parameter.shape) for part, parameter in every[name].named_parameters()}
        new = {part: list(value.shape) for part, value in given.of_module(name).items()}
        if new != sizes:
            raise ValueError(f"given[{name!r}] must be {sizes}, got {new}")
    if several := [*often, *(name for name in given.modules if calls[name] > 1)]:
        raise ValueError(f"repair: {several[0]} is called several times in a run, so it cannot be compared with the whole model")
