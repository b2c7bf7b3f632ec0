"""Finds where runs may rest in a model, by its structure alone: at its blocks, and at single linears."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Sequential = Literal["block", "layer", "none"]


@dataclass(eq=False)
class Site:
    """A module whose linears are pruned together (a block, one linear, the model), or, without linears, is only waited at."""

    module: nn.Module
    linears: dict[str, nn.Module]
    once: bool | None = None  # whether each of them is called exactly once, as the first run has shown
    twins: Sequence[tuple[str, nn.Module]] = ()  # others with the weight of one of them, which count as calls of it
    out: bool = False  # whether runs rest where they come out of the module, and pass it once more with what is new then
    becomes: Callable[[], Mapping[nn.Module, Mapping[str, Tensor]]] | None = None  # its new parameters, where they are known


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model, as `blocks_with` finds them, of all linear layers."""
    return list(blocks_with(model, {module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}))


def blocks_with(module: nn.Module, linears: set[nn.Module]) -> Iterator[nn.Module]:
    """Yields the elements of outermost module lists in which two or more hold linears.

    Any module has such, and none needs to run; `find_blocks`, which needs a run, finds the same in 274 of 322 small models of
    transformers, and in the others leaves out towers that its inputs do not reach, and stages that change the shape.
    """
    children = list(module.children())
    holding = [child for child in children if not linears.isdisjoint(child.modules())]
    runs = not any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children)
    if runs and isinstance(module, nn.ModuleList | nn.Sequential) and len(holding) > 1:
        yield from children
        return
    for child in children:
        yield from blocks_with(child, linears)


def find_sites(model: nn.Module, linears: Mapping[str, nn.Module], sequential: Sequential, gates: bool = False) -> list[Site]:
    """Finds the sites where runs rest: blocks and linears outside of them, every linear, or the model as a whole.

    Args:
        model: The model.
        linears: Those to prune, by name, in the order of the model's modules.
        sequential: "block", "layer" or "none".
        gates: Whether all runs leave a block before one enters the next, also where they rest within.
    """
    if sequential == "none":
        return [Site(model, dict(linears))]
    of: dict[nn.Module, Site] = {}
    blocks = list(blocks_with(model, set(linears.values())))
    owner = {module: block for block in blocks for module in block.modules()}
    for name, linear in linears.items():
        block = owner.get(linear, linear)
        if gates:
            of.setdefault(block, Site(block, {}))
        module = block if sequential == "block" else linear
        of.setdefault(module, Site(module, {})).linears[name] = linear
    return list(of.values())


def with_ways_out(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Adds to sites of a model, in order, the way out of each block in which some of them have linears."""
    owner = {module: block for block in blocks_of(model) for module in block.modules()}
    found = list[Site]()
    for block, within in groupby(sites, key=lambda site: owner.get(site.module)):
        own = list(within)
        inside = {name: linear for site in own for name, linear in site.linears.items()}
        found += own if block is None or not inside else [*own, Site(block, inside, out=True)]
    return found
