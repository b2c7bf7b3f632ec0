"""Repair: refits the consumer layers of removed units to compensate for them.

Layers are refitted in the order of their calls, each on its inputs after all earlier layers were pruned and refitted. If outputs
of several layers are added up, as in the residual stream, a layer also compensates for the residual errors of earlier layers
(`residual_order`).
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import nn

from billhook.arguments import check_fraction, check_types
from billhook.calibration.calibration import log_single_source
from billhook.engine import (
    SINGLE_PROCESS,
    Comm,
    LazyTensors,
    ModulesByName,
    Run,
    Site,
    Walk,
    activation_files,
    by_parameter,
    evaluating_without_grad,
    find_sites,
    replaced,
    runs_fingerprint,
    spilled_outputs,
    store_of,
    watch_call_order,
)
from billhook.linalg import TensorsByName
from billhook.model import is_linear, size_of
from billhook.progress import OnProgress
from billhook.repairs.matching import BlockMatching, Tie, check_enough_batches, match_blocks
from billhook.repairs.residuals import NoRepair, check_tokens, not_refitted_message, too_few_tokens_message
from billhook.repairs.visitor import LinearCalls, RepairVisitor, combine_calls, record_calls, residual_order


@dataclass(frozen=True)
class RepairConfig:
    """Settings of least-squares repair.

    A language model that is fitted to one domain may degrade on others: calibrate on a `Calibration` of several sources,
    including `"generated"`. With a single source, billhook logs a message once. Zero weights stay zero, so a sparse model stays
    sparse.

    Args:
        compensate: If True, a layer also compensates for the errors of earlier layers in the residual stream. Runs each batch a
            second time, through the dense model.
        held_out: Fraction of the calibration batches over all ranks, at least one, that choose the ridge penalty; in (0, 1).
            They are evenly spaced, so that they come from all sources.
        ridges: Candidate ridge penalties, as shares of each input's mean square (or variance, if there is a bias).
        match: Settings of block-wise reconstruction, which then tunes all weights and norms of each block. None skips it.

    Raises:
        ValueError: If the fraction is not between 0 and 1, or there is no ridge penalty, or one is below 0.0001.

    Example:
        >>> RepairConfig(compensate=False, ridges=[0.1, 1.0])
        RepairConfig(compensate=False, held_out=0.2, ridges=[0.1, 1.0], match=None)
    """

    compensate: bool = True
    held_out: float = 0.2
    ridges: Sequence[float] = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    match: BlockMatching | None = None

    def __post_init__(self) -> None:
        check_types(RepairConfig, vars(self))
        check_fraction("held_out", self.held_out, "(0, 1)")
        if not self.ridges or not all(1e-4 <= ridge < math.inf for ridge in self.ridges):
            raise ValueError(f"ridges={self.ridges!r} must be one or more finite numbers of at least 0.0001.")

    def held_out_batches(self, runs: int) -> set[int]:
        """Returns the runs that choose the ridge penalty: evenly spaced, and never all runs."""
        number = min(max(1, round(self.held_out * runs)), runs - 1)
        return {(2 * chosen + 1) * runs // (2 * number) for chosen in range(number)}

    def held_out_on_rank(self, runs: int, comm: Comm) -> set[int]:
        """Returns the runs of this rank that choose the ridge penalty, out of all ranks' runs."""
        count, numbers = comm.batch_numbers(comm.gather(runs))
        chosen = self.held_out_batches(count)
        return {run for run, number in enumerate(numbers) if number in chosen}

    def parts(self, runs: int, comm: Comm = SINGLE_PROCESS) -> list[int]:
        """Returns 1 for each run of this rank that chooses the ridge penalty, and 0 otherwise.

        Raises:
            NoRepair: If no run is left to fit to, or to choose the ridge penalty.
        """
        ranks = comm.gather(runs)
        count, _ = comm.batch_numbers(ranks)
        if not self.held_out_batches(count):
            total = sum(ranks)
            raise NoRepair(f"batches: repair needs at least two batches, because some choose the ridge penalty, got {total}.")
        held_out = self.held_out_on_rank(runs, comm)
        return [int(run in held_out) for run in range(runs)]


def repair_linears(
    model: nn.Module,
    kept: TensorsByName,
    runs: Sequence[Run],
    repair: RepairConfig | None = None,
    comm: Comm = SINGLE_PROCESS,
    new_params: LazyTensors | None = None,
    progress: OnProgress | None = None,
    not_refitted: list[str] | None = None,
    dense: Sequence[Run] | None = None,
    ties: Mapping[str, Tie] | None = None,
) -> LazyTensors:
    """Refits linear layers that lose inputs, and returns their new parameters.

    The model does not change. Next to it, memory holds the new weights; for each batch, the state of its one or two runs while
    they wait, and the residuals of its sums. For one layer at a time it holds, in float64 and for each of two parts of the data,
    the Gram matrix of its kept inputs, `[inputs, inputs]`, and a matrix like its weight, plus a Gram matrix for the solution.
    All except the last can spill to disk (`BlockStore.spill_folder`). If a layer is called several times in a run, residual
    errors are not compensated for. New weights of a streamed model are written block by block and read from disk; those of a
    sharded model become shards. If the model does not call its blocks in sequence, all of them are gathered.

    Args:
        model: The model.
        kept: Mask of kept inputs by layer (`nn.Linear` or `Conv1D`): bool, `[in_features]`. A layer that keeps all inputs is
            refitted, too, if it can compensate for others, or has new parameters.
        runs: The batches, at least two over all ranks, of which some choose the ridge penalty. A rank may have none.
        repair: Repair settings. Defaults to `RepairConfig()`.
        comm: The ranks, each with its own batches.
        new_params: New parameters of layers, refitted or not, in memory layout. Each refitted layer then compensates for its
            error relative to the dense model, which does not change.
        progress: Callback with the number of refitted layers and the total.
        not_refitted: List to which the names of layers without a refit are added.
        dense: The same batches as the dense model runs them, if that differs.
        ties: Changes of gradients by parameter name, for `RepairConfig.match`.

    Returns:
        Weight and bias of each layer by parameter name, with zeros for removed inputs, in its dtype and layout. A layer with
        fewer tokens than kept inputs is not refitted, and a warning names it. With `RepairConfig.match`, also all other
        parameters that were tuned.

    Raises:
        ValueError: If masks, batches, inputs, or `new_params` do not fit, or a layer in `new_params` is called more than once in
            a run.
    """
    repair = repair or RepairConfig()
    every, layers = _check(model, kept)
    needed = {name: int(keep.sum()) for name, keep in kept.items()}
    forwards, sources = [run.visit for run in runs], [run.source for run in runs]
    store, with_new_params = store_of(model), set(new_params.modules if new_params is not None else ())
    parts = repair.parts(len(runs), comm)
    check_enough_batches(repair.match, len(runs), comm)
    log_single_source(model, sources)
    with evaluating_without_grad(model):
        calls, orderly = _shown(model, every, forwards, comm)
        repeated = {name: linear for name, linear in layers.items() if calls.calls[name] > 1}
        predecessors = residual_order(calls, layers.keys() | with_new_params) if repair.compensate and not repeated else {}
        if new_params is not None:  # every layer compensates for its error relative to the dense model
            _check_given(new_params, every, calls.calls, repeated)
            predecessors = dict.fromkeys(layers) | predecessors
        observed = _in_order(every, {*predecessors, *with_new_params, *layers})
        changed = new_params or LazyTensors({})
        visitor = RepairVisitor(observed, kept, predecessors, runs, repair.ridges, parts, comm, changed, progress, store)
        forwards += [run.visit for run in dense or runs] if predecessors else []
        if not store.holds_all and orderly and not repeated:
            masks = hashlib.sha256(str([(name, keep.tolist()) for name, keep in kept.items()]).encode()).hexdigest()
            step = store.step(f"{repair} {sources} {masks}", partial(runs_fingerprint, runs))
            with step, activation_files(store) as visitor.files, spilled_outputs(visitor.files, model):
                new = _refit(model, visitor, {}, forwards, by_block=True)
        else:
            store.check_can_hold_all(f"repair: {', '.join(list(repeated)[:1])} is called several times in a run")
            with store.all_loaded():
                with evaluating_without_grad(model):
                    check_tokens(layers, needed, runs, comm)
                new = _refit(model, visitor, repeated, forwards, by_block=False)
    if len(names := visitor.not_refitted) == len(kept):
        raise NoRepair(too_few_tokens_message(names[0], needed[names[0]]))
    if names:
        warnings.warn(not_refitted_message(names), stacklevel=2)
    if not_refitted is not None:
        not_refitted += names
    if repair.match is None:
        return new
    return match_blocks(model, LazyTensors.of(new_params or {}) | new, runs, repair.match, comm, dense, ties, progress)


def _shown(
    model: nn.Module, every: ModulesByName, forwards: Sequence[Callable[[], object]], comm: Comm
) -> tuple[LinearCalls, bool]:
    """Runs a model once; returns its calls, and whether its blocks are called in sequence."""
    store = store_of(model)
    with store.independently(comm), watch_call_order(store, model) as passed:
        records = [record_calls(every, forward) for forward in forwards[:1]]  # empty on a rank without batches
    rank_records, orderly = zip(*comm.gather((records, passed.orderly)), strict=True)
    return combine_calls(list(chain.from_iterable(rank_records))), all(orderly)


def _refit(
    model: nn.Module,
    visitor: RepairVisitor,
    repeated: ModulesByName,
    forwards: Sequence[Callable[[], object]],
    by_block: bool,
) -> LazyTensors:
    """Refits layers, starting with repeatedly called layers, up to the last block with any."""
    visitor.take(visitor.inside(None) if by_block else visitor.layers)
    refitted = [name for name in visitor.layers if name in visitor.kept]
    if repeated:
        with replaced({visitor.layers[name]: visitor.current(name) for name in refitted}):
            Walk([Site(model, dict(repeated))], visitor, visitor.comm)(forwards)
    if once := _in_order(visitor.layers, visitor.layers.keys() - repeated.keys()):
        sites = find_sites(model, once, "layer", store_of(model).blocks.values() if by_block else ())
        while not sites[-1].linears:
            sites.pop()
        with replaced(dict(zip(repeated.values(), map(visitor.current, repeated), strict=True))):
            Walk(sites, visitor, visitor.comm, visitor.enter if by_block else None)(forwards)
    return visitor.finish() if by_block else LazyTensors.of(by_parameter({name: visitor.current(name) for name in refitted}))


def _in_order(layers: ModulesByName, names: Set[str]) -> dict[str, nn.Module]:
    """Returns the layers of these names, in the order of `layers`."""
    return {name: linear for name, linear in layers.items() if name in names}


def _check(model: nn.Module, kept: TensorsByName) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Returns all linear layers of a model, and the masked layers; raises if a mask is wrong."""
    every = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, keep in kept.items():
        if name not in every:
            kind = type(dict(model.named_modules()).get(name)).__name__.replace("NoneType", "nothing")
            raise ValueError(f"kept: {name!r} is {kind} in {type(model).__name__}, not an nn.Linear or Conv1D.")
        _, width = size_of(every[name])
        if keep.dtype != torch.bool or keep.shape != (width,) or not keep.any():
            raise ValueError(
                f"kept[{name!r}] must be bool of shape [{width}] and keep at least one input, got {keep.dtype} of shape "
                f"{list(keep.shape)} with {int(keep.sum())} kept."
            )
    if not kept:
        raise ValueError("kept is empty. Name at least one linear layer.")
    return every, _in_order(every, kept.keys())


def _check_given(new_params: LazyTensors, every: ModulesByName, calls: Mapping[str, int], repeated: Collection[str]) -> None:
    for name in new_params.modules:
        if name not in every:
            raise ValueError(f"new_params: {name!r} is not an nn.Linear or Conv1D of the model.")
        sizes = {part: list(parameter.shape) for part, parameter in every[name].named_parameters()}
        new = {part: list(value.shape) for part, value in new_params.of_module(name).items()}
        if new != sizes:
            raise ValueError(f"new_params[{name!r}] must have the shapes {sizes}, got {new}.")
    for name in (*repeated, *new_params.modules):
        if calls[name] > 1:
            raise ValueError(f"repair: {name} is called several times in a run, so it cannot be compared with the dense model.")
