"""Checks the arguments of `prune` before any run, and makes runs of batches."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import (
    SINGLE_PROCESS,
    Comm,
    InputGram,
    ModulesByName,
    Run,
    Sequential,
    find_sites,
    is_tensor_parallel,
    runs_of,
    store_of,
)
from billhook.model import (
    ExpertLinear,
    adjacent_inputs,
    base_of,
    holder_of,
    is_adapter,
    is_convolution,
    prunable,
    stacks_of,
)
from billhook.repairs.matching import check_enough_batches
from billhook.sparsity.allocation import Uniform
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.masks import parse_pattern
from billhook.sparsity.options import PruneOptions

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def needs_data(criterion: Criterion) -> bool:
    """Returns True if a criterion needs statistics of layer inputs."""
    return criterion.statistics(1, "meta") is not None


def solves_for_weights(criterion: Criterion) -> bool:
    """Returns True if a criterion solves with Gram matrices, which need enough tokens."""
    return isinstance(criterion.statistics(1, "meta"), InputGram)


def check_pruning(model: nn.Module, criterion: Criterion, pattern: str, options: PruneOptions) -> dict[str, nn.Module]:
    """Checks the arguments of `prune` that need no data; returns the linear layers to prune.

    Args:
        model: The model.
        criterion: The criterion.
        pattern: The pattern.
        options: The options.

    Raises:
        ValueError: If an argument is not legal, two cannot be combined, or a layer does not fit the pattern.
    """
    if not isinstance(criterion, Criterion):
        raise ValueError(f"criterion={criterion!r} must be a Criterion, such as Wanda().")
    every = prunable(model, options.output_embeddings, options.convolutions)
    if not every:
        raise ValueError(f"model: {type(model).__name__} has no linear layers to prune.")
    empty = next((name for name, linear in every.items() if getattr(*holder_of(linear)).is_meta), None)
    if empty is not None and store_of(model).holds_all:
        raise ValueError(f"model: {empty} has no values (it is on the meta device). Load all weights first.")
    linears = dict(every)
    for skipped in options.patterns:
        matching = [name for name in every if fnmatchcase(name, skipped)]
        if not matching:
            raise ValueError(f"skip={skipped!r} matches none of the {len(every)} linear layers, such as {list(every)[:3]}.")
        for name in matching:
            linears.pop(name, None)
    if not linears:
        raise ValueError(f"skip={list(options.patterns)} excludes all {len(every)} linear layers. Exclude fewer.")
    adapted = {base_of(module) for module in model.modules() if is_adapter(module)}
    for name, linear in linears.items():
        if isinstance(linear, ExpertLinear) and linear.experts in adapted:
            raise ValueError(
                f"model: the parameter of {name} has an adapter. Prune the model before it is attached, or exclude it with skip."
            )
    sequential, allocation = options.sequential, options.allocation
    group, compares_all = parse_pattern(pattern), criterion.compares == "global"
    if compares_all and group is not None:
        raise ValueError(f"criterion={criterion} compares all layers and does not support pattern={pattern!r}. Use only one.")
    if compares_all and needs_data(criterion) and sequential != "none":
        raise ValueError(f"sequential={sequential!r} must be 'none' with criterion={criterion}, which compares all layers.")
    if not isinstance(allocation, Uniform | None) and (group is not None or compares_all):
        other = f"criterion={criterion}" if group is None else f"pattern={pattern!r}"
        raise ValueError(f"allocation={allocation} cannot be combined with {other}, which determines each layer's sparsity.")
    for name, linear in linears.items():
        if group is not None and (width := adjacent_inputs(linear)) % group[1]:
            inputs = "channels" if is_convolution(linear) else "inputs"
            raise ValueError(
                f"pattern={pattern!r}: {name} has {width} {inputs}, not a multiple of {group[1]}. Exclude it with skip."
            )
    return linears


def make_runs(model: nn.Module, batches: Batches | None, comm: Comm, criterion: Criterion, options: PruneOptions) -> list[Run]:
    """Makes a run of each batch if data is needed.

    Args:
        model: The model.
        batches: See `prune`.
        comm: The ranks.
        criterion: The criterion.
        options: The options.

    Raises:
        ValueError: If data is needed and any rank has too few batches.
    """
    if not needs_data(criterion) and not options.needs_data:
        return []
    user = criterion if needs_data(criterion) else options.match or options.allocation
    problem = f"{type(user).__name__} needs calibration data."
    if batches is None and comm is not SINGLE_PROCESS:
        raise ValueError(f"batches=None: {problem} Pass batches.")
    runs = runs_of(model, read_batches(batches, model))
    if not any(comm.gather(len(runs))):
        raise ValueError(f"batches is empty: {problem} Pass at least one batch.")
    check_enough_batches(options.match, len(runs), comm)
    return runs


def expected_tokens(criterion: Criterion, layers: ModulesByName, runs: Sequence[Run], comm: Comm) -> dict[str, tuple[int, int]]:
    """Returns the numbers of tokens and inputs of each layer, if known before any run.

    Empty if they are unknown, or the criterion does not solve for weights, which needs as many tokens as inputs.

    Args:
        criterion: The criterion.
        layers: The linear layers by name.
        runs: The batches.
        comm: The ranks.
    """
    if not solves_for_weights(criterion):
        return {}
    total, unknown = 0, False
    for run in runs:
        ids = run.batch.get("input_ids") if isinstance(run.batch, Mapping) else None
        if not isinstance(ids, Tensor) or "decoder_input_ids" in run.batch or "decoder_attention_mask" in run.batch:
            unknown = True
            continue
        mask = run.tokens.get("attention_mask")
        total += ids.numel() if mask is None else int(mask.sum())
    total, unknown = comm(torch.tensor([total, unknown], device=comm.device)).tolist()
    if unknown:
        return {}
    return {name: (total, adjacent_inputs(linear)) for name, linear in layers.items() if not is_convolution(linear)}


def too_few_tokens(criterion: Criterion, tokens_and_inputs: Mapping[str, tuple[int, int]]) -> str:
    """Returns the warning for layers with fewer tokens than inputs, or an empty string.

    Args:
        criterion: Criterion of pruning.
        tokens_and_inputs: Number of tokens and of inputs of each linear layer.
    """
    too_few = {name: (tokens, width) for name, (tokens, width) in tokens_and_inputs.items() if tokens < width}
    if not too_few or not solves_for_weights(criterion):
        return ""
    name, (tokens, width) = max(too_few.items(), key=lambda item: item[1][1] - item[1][0])
    layers = "1 linear layer has" if len(too_few) == 1 else f"{len(too_few):,} linear layers have"
    return (
        f"{layers} fewer calibration tokens than inputs, such as {name} "
        f"({tokens:,} for {width:,}), so the damping of {criterion} determines their weights. Use more tokens, or Wanda(), which "
        "needs few."
    )


def check_called(linears: Iterable[str], pruned: Collection[str]) -> tuple[str, ...]:
    """Returns the linear layers without tokens, and warns; raises if that is all of them."""
    missing = tuple(name for name in linears if name not in pruned)
    if not pruned:
        raise ValueError(f"batches: no linear layer was called with a non-padding token, for example {missing[0]}.")
    if missing:
        layers = f"{len(missing)} linear layer{'s' * (len(missing) > 1)}"
        warnings.warn(f"no calibration batch called {layers}, kept dense: {', '.join(missing)}", stacklevel=4)
    return missing


def check_matching(criterion: Criterion, sequential: Sequential) -> None:
    """Raises if an argument cannot be combined with block-wise reconstruction."""
    if criterion.compares == "global" or sequential == "none":
        other = "sequential='none'" if sequential == "none" else f"criterion={criterion}"
        raise ValueError(f"match cannot be combined with {other}, which prunes all blocks at once. Use only one.")


def check_sharded(model: nn.Module, criterion: Criterion, options: PruneOptions, comm: Comm, offload: object) -> None:
    """Raises if an argument is not supported for a sharded model.

    Args:
        model: The model.
        criterion: The criterion.
        options: The options.
        comm: The ranks.
        offload: See `prune`.
    """
    if offload is not None:
        raise ValueError(
            f"offload={str(offload)!r} is not supported for a sharded model. Omit it: blocks are gathered one at a time."
        )
    reads = needs_data(criterion) or options.needs_data
    if reads and is_tensor_parallel(model):
        raise ValueError(
            f"model: tensor parallelism splits its weights, which {criterion} and its options do not support. Load it without a "
            "tensor-parallel plan, or use Magnitude."
        )
    if comm is SINGLE_PROCESS and torch.distributed.get_world_size() > 1 and reads:
        raise ValueError("reduce=None: the model is sharded, so ranks would prune by different batches. Pass reduce.")


def check_streamed(model: nn.Module, comm: Comm) -> None:
    """Raises if several ranks would write the same folder."""
    if store_of(model).in_files and comm is not SINGLE_PROCESS:
        raise ValueError("reduce is not supported for a streamed model, because ranks would write the same folder. Use one rank.")


def unsupported_weights(model: nn.Module, linears: ModulesByName) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of weights of several matrices that are not stacked experts."""
    inside = {module for site in find_sites(model, linears, "block") for module in site.module.modules()}
    shapes = dict[str, tuple[int, ...]]()
    for owner, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False) if module in inside else ():
            name, shape = f"{owner}.{attribute}", tuple(parameter.shape)
            supported = isinstance(module, CONVOLUTIONS) or attribute in stacks_of(module)
            if len(shape) == 3 and min(shape) > 1 and not supported:
                shapes[name] = shape
    return shapes


def warn_of_unsupported_weights(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Warns of weights that are not pruned, similar ones once."""
    if shapes:
        similar = {re.sub(r"\b\d+\b", "*", name): list(shape) for name, shape in shapes.items()}
        listed = ", ".join(f"{name} {shape}" for name, shape in similar.items())
        warnings.warn(f"these weights hold several matrices, are not linear layers, and stay dense: {listed}", stacklevel=4)


def check_folder(activations: str | None, model: nn.Module | None = None) -> str | None:
    """Returns the folder; raises if it does not exist or outputs are not on the CPU."""
    if activations is None:
        return None
    if not Path(activations).is_dir():
        raise ValueError(f"activations={activations!r} must be an existing folder.")
    first = None if model is None else next(model.parameters(), None)
    if first is not None and first.device.type != "cpu":
        raise ValueError(
            f"activations={activations!r} does not support a model on {first.device}, because its outputs stay there. Move the "
            f"model to the CPU, and pass offload='{first.device.type}'."
        )
    return activations
