"""Checks the arguments of pruning, as far as that is possible before there is data."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from billhook.adapters.masked import plain_adapters
from billhook.arguments import one_of
from billhook.engine.batches import Run, runs_of
from billhook.engine.comm import ALONE, Comm
from billhook.engine.statistics import InputMoments
from billhook.engine.store import store_of
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import Sequential, find_sites
from billhook.model.linears import Convolutions, active_in, channels, is_convolution, prunable
from billhook.model.meta import to_meta
from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.masks import parse_pattern
from billhook.sparsity.matching import BlockMatching
from billhook.sparsity.visitor import refuse_again

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def needs_data(criterion: Criterion) -> bool:
    """Returns True for a criterion that needs statistics of a linear's inputs."""
    return criterion.statistics(1, "meta") is not None


def needing(criterion: Criterion, allocation: Allocation, match: BlockMatching | None = None) -> list[object]:
    """Returns what needs data."""
    needs = [(criterion, needs_data(criterion)), (allocation, allocation.measures), (match, match is not None)]
    return [one for one, does in needs if does]


def check_pruning(
    model: nn.Module,
    criterion: Criterion,
    pattern: str = "unstructured",
    sequential: Sequential = "block",
    allocation: Allocation | None = None,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
    convolutions: Convolutions = "mixing",
) -> dict[str, nn.Module]:
    """Checks arguments of `prune` before there is data; returns the linears to prune, by name. See `prune`."""
    if not isinstance(criterion, Criterion):
        raise ValueError(f"criterion={criterion!r} must be a Criterion, such as Wanda()")
    one_of("sequential", sequential, Sequential)
    one_of("convolutions", convolutions, Convolutions)
    linears = _linears(model, skip, output_embeddings, convolutions)
    kept, all_layers = parse_pattern(pattern), criterion.compares == "global"
    if all_layers and kept is not None:
        raise ValueError(f"criterion={criterion} compares all layers, and pattern={pattern!r} within groups: ask for one")
    if all_layers and needs_data(criterion) and sequential != "none":
        raise ValueError(f"criterion={criterion} compares all layers at once: sequential must be 'none', got {sequential!r}")
    if not isinstance(allocation, Uniform | None) and (kept is not None or all_layers):
        other = f"criterion={criterion} compares all of them" if kept is None else f"pattern={pattern!r} says it for all"
        raise ValueError(f"allocation={allocation} says how sparse each linear is, and {other}: ask for one")
    for name, linear in linears.items():
        if kept is not None and (width := channels(linear)) % kept[1]:
            read = "channels" if is_convolution(linear) else "inputs"
            raise ValueError(f"pattern={pattern!r}: {name} has {width} {read}, which {kept[1]} does not divide; skip it")
    return linears


def adapters_to_count(model: nn.Module, criterion: Criterion, linears: Iterable[str]) -> dict[str, nn.Module]:
    """Finds the layers of LoRA on these linears, by linear, for a criterion that is to count them in."""
    if criterion.updates:
        raise ValueError(
            f"count_adapters=True needs a criterion that leaves kept weights as they are, such as Wanda, and "
            f"{type(criterion).__name__} changes them: merge the adapters first (bh.training.merge), or leave count_adapters off"
        )
    layers = plain_adapters(model, linears, "count_adapters=True")
    if not any(active_in(layer) for layer in layers.values()):
        raise ValueError(f"count_adapters=True: no adapter is active, such as that of {next(iter(layers))}: enable one")
    return layers


def _linears(model: nn.Module, skip: Sequence[str], output_embeddings: bool, convolutions: Convolutions) -> dict[str, nn.Module]:
    skip = [skip] if isinstance(skip, str) else skip
    linears = prunable(model, output_embeddings, convolutions)
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no linear layers to prune")
    empty = next((name for name, linear in linears.items() if linear.get_parameter("weight").is_meta), None)
    if empty is not None and store_of(model).holds_all:
        raise ValueError(f"model: {empty} has no weights yet (it is on the meta device): load them first")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip={pattern!r} matches none of the {len(linears)} linears, such as {list(linears)[:3]}")
    chosen = {name: m for name, m in linears.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not chosen:
        raise ValueError(f"skip={list(skip)} leaves none of the {len(linears)} linears")
    return chosen


def tokens_in(runs: Sequence[Run], comm: Comm) -> int | None:
    """Counts the tokens of all runs, on all ranks, before any runs; None where it is not known what linears are given."""
    counts = [_tokens(run) for run in runs]
    total, unknown = sum(one or 0 for one in counts), sum(one is None for one in counts)
    total, unknown = comm(torch.tensor([total, unknown], device=comm.device)).tolist()
    return None if unknown else int(total)


def _tokens(run: Run) -> int | None:
    ids = run.batch.get("input_ids") if isinstance(run.batch, Mapping) else None
    if not isinstance(ids, Tensor) or "decoder_input_ids" in run.batch or "decoder_attention_mask" in run.batch:
        return None
    counting = run.tokens.get("attention_mask")
    return ids.numel() if counting is None else int(counting.sum())


def solves(criterion: Criterion) -> bool:
    """Tells whether a criterion solves for weights by products of inputs, which fewer tokens than inputs leave singular."""
    return isinstance(criterion.statistics(1, "meta"), InputMoments)


def few_tokens(criterion: Criterion, given: Mapping[str, tuple[int, int]]) -> str:
    """Returns the words for linears that are given fewer tokens than they have inputs; empty if that matters for none.

    Args:
        criterion: By what they are pruned.
        given: By linear, how many tokens it is given, and how many inputs it has.
    """
    short = {name: (tokens, width) for name, (tokens, width) in given.items() if tokens < width}
    if not short or not solves(criterion):
        return ""
    name, (tokens, width) = max(short.items(), key=lambda item: item[1][1] - item[1][0])
    return (
        f"fewer tokens than inputs come to {len(short):,} linear{'s' * (len(short) > 1)}, such as {name}, "
        f"{tokens:,} for {width:,}: too few to solve for weights by {criterion}, whose damping then decides; give more tokens, "
        "or take Wanda(), which needs few"
    )


def uncalled(linears: Iterable[str], pruned: Collection[str]) -> tuple[str, ...]:
    """Names the linears that were given no token; if none was given any, that is an error."""
    found = tuple(name for name in linears if name not in pruned)
    if not pruned:
        raise ValueError(f"batches: no linear has been given a token that counts; the first is {found[0]}")
    if found:
        what = f"{len(found)} linears, which stay as they are: {', '.join(found)}"
        warnings.warn(f"no calibration batch has called {what}", stacklevel=3)
    return found


def check_matching(criterion: Criterion, sequential: Sequential, count_adapters: bool) -> None:
    """Refuses what does not go together with matching of blocks."""
    if criterion.compares == "global" or sequential == "none":
        what = "sequential='none'" if sequential == "none" else f"criterion={criterion}"
        raise ValueError(f"match: {what} prunes all blocks at once, and they are matched one after the other: ask for one")
    if count_adapters:
        raise ValueError("match changes kept weights, and count_adapters=True leaves them as they are: ask for one")


def check_sharded(criterion: Criterion, allocation: Allocation, comm: Comm, offload: object) -> None:
    """Refuses arguments that do not suit a model that is sharded over ranks."""
    if offload is not None:
        raise ValueError(f"offload={str(offload)!r}: the model is sharded, its blocks are gathered one at a time: leave it out")
    ranks = torch.distributed.get_world_size()
    if comm is ALONE and ranks > 1 and (needs_data(criterion) or allocation.measures):
        raise ValueError("reduce=None: the model is sharded, and each rank would prune by its own batches: say how ranks sum")


def check_streamed(comm: Comm) -> None:
    """Refuses arguments that do not suit a model that is streamed."""
    if comm is not ALONE:
        raise ValueError("reduce: the model is streamed, and each rank would write the same folder: prune it on one")


def check_called_once(model: nn.Module, runs: Sequence[Run]) -> None:
    """Refuses a streamed model that calls a block again later, as far as a run on the meta device tells; none is read for it."""
    batch = next((run.batch for run in runs if run.batch is not None), None)
    if batch is None or not (store := store_of(model)).in_files:
        return
    shadow, calls = to_meta(store.model), Counter[str]()
    for name in store.blocks:
        shadow.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    batch = tree_map_only(Tensor, lambda one: one.to("meta"), batch)
    with suppress(Exception), torch.no_grad():  # code that asks for values has none there
        runs_of(shadow, [batch])[0].visit()
    if again := next((name for name in store.blocks if calls[name] > 1), None):
        refuse_again(again)


def warn_of_others(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Warns about weights that hold several matrices but are no linears: of three dimensions, as experts in one tensor are."""
    inside = {module for site in find_sites(model, linears, "block") for module in site.module.modules()}
    found = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False) if module in inside else ():
            if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, CONVOLUTIONS):
                found[re.sub(r"\b\d+\b", "*", f"{name}.{attribute}")] = list(parameter.shape)
    if found:
        what = ", ".join(f"{name} {shape}" for name, shape in found.items())
        warnings.warn(f"these hold several matrices each, but are no linear layers and stay as they are: {what}", stacklevel=3)


def check_folder(activations: str | None) -> str | None:
    """Returns the folder of that name."""
    if activations is not None and not Path(activations).is_dir():
        raise ValueError(f"activations={activations!r} must be a folder that exists")
    return activations
