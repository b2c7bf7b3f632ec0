"""Checks the arguments of pruning, as far as that is possible before there is data, and makes runs of what data there is."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from billhook.adapters.masked import require_plain_adapters
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.batches import Run, runs_of
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.statistics import InputGram
from billhook.engine.store import store_of
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import Sequential, find_sites
from billhook.model.layers import active_in, adjacent_inputs, is_convolution, prunable
from billhook.model.meta import to_meta
from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.masks import parse_pattern
from billhook.sparsity.matching import BlockMatching
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.visitor import raise_called_again

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def needs_data(criterion: Criterion) -> bool:
    """Returns True for a criterion that needs statistics of a linear's inputs."""
    return criterion.statistics(1, "meta") is not None


def solves_for_weights(criterion: Criterion) -> bool:
    """Tells whether a criterion solves for weights by products of inputs, which fewer tokens than inputs leave singular."""
    return isinstance(criterion.statistics(1, "meta"), InputGram)


def check_pruning(
    model: nn.Module,
    criterion: Criterion,
    pattern: str,
    options: PruneOptions,
) -> dict[str, nn.Module]:
    """Checks arguments of `prune` before there is data; returns the linears to prune, by name. See `prune`."""
    if not isinstance(criterion, Criterion):
        raise ValueError(f"criterion={criterion!r} must be a Criterion, such as Wanda()")
    linears = _linears(model, options)
    sequential, allocation = options.sequential, options.allocation
    group, all_layers = parse_pattern(pattern), criterion.compares == "global"
    if all_layers and group is not None:
        raise ValueError(f"criterion={criterion} compares all layers, and pattern={pattern!r} within groups: ask for one")
    if all_layers and needs_data(criterion) and sequential != "none":
        raise ValueError(f"criterion={criterion} compares all layers at once: sequential must be 'none', got {sequential!r}")
    if not isinstance(allocation, Uniform | None) and (group is not None or all_layers):
        other = f"criterion={criterion} compares all of them" if group is None else f"pattern={pattern!r} says it for all"
        raise ValueError(f"allocation={allocation} says how sparse each linear is, and {other}: ask for one")
    for name, linear in linears.items():
        if group is not None and (width := adjacent_inputs(linear)) % group[1]:
            inputs = "channels" if is_convolution(linear) else "inputs"
            raise ValueError(f"pattern={pattern!r}: {name} has {width} {inputs}, which {group[1]} does not divide; skip it")
    return linears


def _linears(model: nn.Module, options: PruneOptions) -> dict[str, nn.Module]:
    linears = prunable(model, options.output_embeddings, options.convolutions)
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no linear layers to prune")
    empty = next((name for name, linear in linears.items() if linear.get_parameter("weight").is_meta), None)
    if empty is not None and store_of(model).holds_all:
        raise ValueError(f"model: {empty} has no weights yet (it is on the meta device): load them first")
    chosen = dict(linears)
    for pattern in options.patterns:
        skipped = [name for name in linears if fnmatchcase(name, pattern)]
        if not skipped:
            raise ValueError(f"skip={pattern!r} matches none of the {len(linears)} linears, such as {list(linears)[:3]}")
        for name in skipped:
            chosen.pop(name, None)
    if not chosen:
        raise ValueError(f"skip={list(options.patterns)} leaves none of the {len(linears)} linears")
    return chosen


def find_countable_adapters(model: nn.Module, criterion: Criterion, linears: Iterable[str]) -> dict[str, nn.Module]:
    """Finds the layers of LoRA on these linears, by linear, for a criterion that is to count them in."""
    if criterion.updates:
        raise ValueError(
            f"count_adapters=True needs a criterion that leaves kept weights as they are, such as Wanda, and "
            f"{type(criterion).__name__} changes them: merge the adapters first (bh.training.merge), or leave count_adapters off"
        )
    layers = require_plain_adapters(model, linears, "count_adapters=True")
    if not any(active_in(layer) for layer in layers.values()):
        raise ValueError(f"count_adapters=True: no adapter is active, such as that of {next(iter(layers))}: enable one")
    return layers


def make_runs(
    model: nn.Module,
    batches: Batches | None,
    comm: Comm,
    criterion: Criterion,
    allocation: Allocation | None = None,
    match: BlockMatching | None = None,
) -> list[Run]:
    """Makes a run of each batch, if something needs data; refuses to go without any, on all ranks together."""
    reader = criterion if needs_data(criterion) else allocation if allocation is not None and allocation.measures else match
    if reader is None:
        return []
    who = f"{type(reader).__name__} needs calibration data"
    if batches is None and comm is not SINGLE_PROCESS:
        raise ValueError(f"batches=None: {who}")
    runs = runs_of(model, read_batches(batches, model))
    lacks = int(match is not None and len(runs) < 2)
    counts = torch.tensor([len(runs), lacks], device=next(model.parameters()).device)
    count, lacking = comm(counts).tolist()
    if not count:
        raise ValueError(f"batches=an empty collection: {who}")
    if lacking:
        each = "" if comm is SINGLE_PROCESS else " on each rank"
        raise ValueError(f"batches: match holds some out, and needs two at least{each}, got {len(runs)} here: give smaller ones")
    return runs


def count_tokens(runs: Sequence[Run], comm: Comm) -> int | None:
    """Counts the tokens of all runs, on all ranks, before any runs; None where it is not known what linears are given."""
    total = unknown = 0
    for run in runs:
        ids = run.batch.get("input_ids") if isinstance(run.batch, Mapping) else None
        if not isinstance(ids, Tensor) or "decoder_input_ids" in run.batch or "decoder_attention_mask" in run.batch:
            unknown += 1
            continue
        mask = run.tokens.get("attention_mask")
        total += ids.numel() if mask is None else int(mask.sum())
    total, unknown = comm(torch.tensor([total, unknown], device=comm.device)).tolist()
    return None if unknown else total


def too_few_tokens(criterion: Criterion, given: Mapping[str, tuple[int, int]]) -> str:
    """Returns the words for linears that are given fewer tokens than they have inputs; empty if that matters for none.

    Args:
        criterion: By what they are pruned.
        given: By linear, how many tokens it is given, and how many inputs it has.
    """
    short = {name: (tokens, width) for name, (tokens, width) in given.items() if tokens < width}
    if not short or not solves_for_weights(criterion):
        return ""
    name, (tokens, width) = max(short.items(), key=lambda item: item[1][1] - item[1][0])
    return (
        f"fewer tokens than inputs come to {len(short):,} linear{'s' * (len(short) > 1)}, such as {name}, "
        f"{tokens:,} for {width:,}: too few to solve for weights by {criterion}, whose damping then decides; give more tokens, "
        "or take Wanda(), which needs few"
    )


def check_called(linears: Iterable[str], pruned: Collection[str]) -> tuple[str, ...]:
    """Names the linears that were given no token; if none was given any, that is an error."""
    names = tuple(name for name in linears if name not in pruned)
    if not pruned:
        raise ValueError(f"batches: no linear has been given a token that counts; the first is {names[0]}")
    if names:
        what = f"{len(names)} linears, which stay as they are: {', '.join(names)}"
        warnings.warn(f"no calibration batch has called {what}", stacklevel=3)
    return names


def check_matching(criterion: Criterion, sequential: Sequential, count_adapters: bool) -> None:
    """Refuses what does not go together with matching of blocks."""
    if criterion.compares == "global" or sequential == "none":
        what = "sequential='none'" if sequential == "none" else f"criterion={criterion}"
        raise ValueError(f"match: {what} prunes all blocks at once, and they are matched one after the other: ask for one")
    if count_adapters:
        raise ValueError("match changes kept weights, and count_adapters=True leaves them as they are: ask for one")


def check_sharded(criterion: Criterion, allocation: Allocation | None, comm: Comm, offload: object) -> None:
    """Refuses arguments that do not suit a model that is sharded over ranks."""
    if offload is not None:
        raise ValueError(f"offload={str(offload)!r}: the model is sharded, its blocks are gathered one at a time: leave it out")
    reads = needs_data(criterion) or (allocation is not None and allocation.measures)
    if comm is SINGLE_PROCESS and torch.distributed.get_world_size() > 1 and reads:
        raise ValueError("reduce=None: the model is sharded, and each rank would prune by its own batches: say how ranks sum")


def check_streamed(model: nn.Module, comm: Comm) -> None:
    """Refuses ranks that would write one folder."""
    if store_of(model).in_files and comm is not SINGLE_PROCESS:
        raise ValueError("reduce: the model is streamed, and each rank would write the same folder: prune it on one")


def check_called_once(model: nn.Module, runs: Sequence[Run]) -> None:
    """Refuses a streamed model that calls a block again later, as far as a run on the meta device says; none is read for it."""
    batch, store = next((run.batch for run in runs if run.batch is not None), None), store_of(model)
    if not store.in_files or batch is None:
        return
    empty, calls = to_meta(store.model), Counter[str]()
    for name in store.blocks:
        empty.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    batch = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), batch)
    with suppress(Exception), torch.no_grad():  # code that asks for values has none there
        runs_of(empty, [batch])[0].visit()
    if again := next((name for name in store.blocks if calls[name] > 1), None):
        raise_called_again(again)


def warn_of_unsupported_weights(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Warns about weights that hold several matrices but are no linears: of three dimensions, as experts in one tensor are."""
    inside = {module for site in find_sites(model, linears, "block") for module in site.module.modules()}
    shapes = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False) if module in inside else ():
            if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, CONVOLUTIONS):
                shapes[re.sub(r"\b\d+\b", "*", f"{name}.{attribute}")] = list(parameter.shape)
    if shapes:
        what = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        warnings.warn(f"these hold several matrices each, but are no linear layers and stay as they are: {what}", stacklevel=3)


def check_folder(activations: str | None) -> str | None:
    """Returns the folder of that name."""
    if activations is not None and not Path(activations).is_dir():
        raise ValueError(f"activations={activations!r} must be a folder that exists")
    return activations
