"""Runs a model on all batches side by side: every run stops at each site.

Every run is the model's own forward in a separate greenlet, so masks, rotary embeddings, encoder states, and
all other block inputs are computed by the model itself. Nothing is replayed.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.state import TorchState, overridden, replaced
from billhook.engine.trees import ModulesByName

Sequential = Literal["block", "layer", "none"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments and the keywords of a call


@dataclass(eq=False)
class Site:
    """A stop of the walk: a block, a layer, or the model, with the layers pruned there.

    Runs pause at the module until all of them have arrived. A site without layers is only waited at.
    """

    module: nn.Module
    linears: dict[str, nn.Module]
    once: bool | None = None  # whether the first run called each layer exactly once
    tied: Sequence[tuple[str, nn.Module]] = ()  # layers with a tied weight, whose calls count for the named one
    out: bool = False  # whether runs stop after the module, and run it again with the new parameters
    done: bool = False  # whether the new parameters are known, so that runs only pass through


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model, as `blocks_with` finds them, of all linear layers."""
    return list(blocks_with(model, {module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}))


def separable_blocks(model: nn.Module, parameters: Iterable[tuple[tuple[nn.Module, str], nn.Parameter]]) -> list[nn.Module]:
    """Returns the blocks that hold some of the parameters and share none with other modules."""
    holders = defaultdict(set)
    for (module, _), parameter in parameters:
        holders[parameter].add(module)
    apart = []
    for block in blocks_of(model):
        inside = set(block.modules())
        within = [modules for modules in holders.values() if not inside.isdisjoint(modules)]
        if within and all(modules <= inside for modules in within):
            apart.append(block)
    return apart


def blocks_with(module: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """Yields the elements of outermost module lists if at least two have linear layers.

    The module need not run. `find_blocks`, which runs it, returns the same for 274 of 322 small transformers models. For the
    others it omits towers that its inputs do not reach and stages that change the shape.
    """
    children = list(module.children())
    with_layers = [child for child in children if not layers.isdisjoint(child.modules())]
    innermost = not any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children)
    if innermost and isinstance(module, nn.ModuleList | nn.Sequential) and len(with_layers) > 1:
        yield from children
        return
    for child in children:
        yield from blocks_with(child, layers)


def find_sites(model: nn.Module, layers: ModulesByName, sequential: Sequential, gates: Collection[nn.Module] = ()) -> list[Site]:
    """Finds the stops of a walk: blocks and layers outside of them, every layer, or the model.

    Args:
        model: The model.
        layers: The layers to prune, by name, in module order.
        sequential: `"block"`, `"layer"`, or `"none"`.
        gates: Blocks that all runs leave before any enters the next one, in addition.
    """
    if sequential == "none":
        return [Site(model, dict(layers))]
    sites: dict[nn.Module, Site] = {}
    owner = {module: block for block in blocks_with(model, set(layers.values())) for module in block.modules()}
    for name, layer in layers.items():
        module = owner.get(layer, layer) if sequential == "block" else layer
        sites.setdefault(module, Site(module, {})).linears[name] = layer
    if not gates:
        return list(sites.values())
    for block in gates:
        sites.setdefault(block, Site(block, {}))
    return [sites[module] for module in model.modules() if module in sites]


def with_exits(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Adds the exit of each block with pending layers to the sites."""
    owner = {module: block for block in blocks_of(model) for module in block.modules()}
    ordered = []
    for block, within in groupby(sites, key=lambda site: owner.get(site.module)):
        group = list(within)
        inside = {name: linear for site in group for name, linear in site.linears.items() if not site.done}
        ordered += group if block is None or not inside else [*group, Site(block, inside, out=True)]
    return ordered


class Visitor:
    """The work that is done at sites. By default, every method does nothing.

    Attributes:
        untouched: Numbers of runs that keep the old parameters to the end, for comparison.
        dense: Numbers of untouched runs that are not observed.
        ends: Number of runs that continue to their end after the last site. With at least one, `again` lists all reentered sites.
    """

    untouched: Collection[int] = ()
    dense: Collection[int] = ()
    ends = 0

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Observes a call of a layer (or a layer with its weight) at an incomplete site.

        Args:
            name: Name of the layer.
            linear: The layer.
            inputs: Its inputs, `[..., in_features]`.
            run: Number of the run.
        """

    def complete(self, site: Site) -> None:
        """Completes a site with layers, after all runs on all ranks have arrived."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new parameters of a complete site, by layer and parameter name."""
        return {}

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Receives the arguments and output of a module at its exit."""

    def on_reentry(self, site: Site) -> None:
        """Is called when a run reaches a complete site again."""

    def leave(self, site: Site) -> None:
        """Is called when all runs on all ranks have passed a site."""


class _Observed(BaseException):  # not an `Exception`, which model code might catch
    """Ends a forward early, after all layers of a site have been called."""


class Walk:
    """Runs forwards side by side. The visitor is always called in the state `TorchState()`.

    Args:
        sites: The stops.
        visitor: The work at each stop.
        comm: The ranks, each with its own runs. All ranks complete the same sites in the same order, even without a run there.
        enter: Called on all ranks with the module of a site before runs continue in it, such as to load its block.

    Attributes:
        run: The number of the current run.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        visitor: Visitor,
        comm: Comm = SINGLE_PROCESS,
        enter: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.sites, self.visitor, self.comm, self.enter = list(sites), visitor, comm, enter
        self.complete: set[Site] = set()
        self.again: set[Site] = set()
        self._watched: Site | None = None
        self._calls: list[str] = []
        self.run, self._straight, self._runs = 0, False, list[greenlet]()
        self._pruned_parameters: tuple[Site | None, Mapping[nn.Module, Mapping[str, Tensor]]] = (None, {})

    def __call__(self, forwards: Iterable[Callable[[], object]]) -> list[str]:
        """Runs all forwards to the end, and returns the layers that no run has called.

        `again` then holds the sites that a run reached after they were complete. These calls were not observed.
        """
        self._main, self._caller = greenlet.getcurrent(), TorchState.now()
        self._runs = [greenlet(forward) for forward in forwards]
        try:
            with ExitStack() as stack:
                for site in self.sites:
                    visit = self._visit_exit if site.out else self._visit
                    stack.enter_context(overridden(site.module, forward=partial(visit, site, site.module.forward)))
                    for name, linear in (*site.linears.items(), *site.tied):
                        hook = partial(self._listen, site, name)
                        stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
                self._go()
                self.again = set(self._on_any_rank(self.again))
        finally:
            for run in self._runs:
                run.throw()  # ends paused runs, also after an error, and frees their frames
            self._caller.restore()
        return [name for site in self.sites if site not in self.complete for name in site.linears]

    def _go(self) -> None:
        waiting = [self._resume(number) for number in range(len(self._runs))]  # the site at which each run waits
        # the first such site on any rank, so that ranks with different paths complete the same sites
        while reached := self._on_any_rank(set(waiting)):
            site = reached[0]
            arrived = [number for number, other in enumerate(waiting) if other is site]
            self._enter(site)
            if site.linears and not site.done:
                for number in arrived:
                    self._resume(number)  # observes the layers, and stops at the same site again
                self.visitor.complete(site)
                self._enter(site)  # the visitor may have loaded another block
            self.complete.add(site)
            last = len(self.complete) == len(self.sites)
            for number in arrived[: self.visitor.ends] if last else arrived:
                waiting[number] = self._resume(number)
            self._pruned_parameters = (None, {})
            self.visitor.leave(site)
            if last:
                return

    def _enter(self, site: Site) -> None:
        if self.enter is not None:
            self.enter(site.module)

    def _on_any_rank(self, sites: Collection[Site | None]) -> list[Site]:
        """Returns the sites that any rank names, in order. All ranks call it together."""
        flags = self.comm(torch.tensor([float(site in sites) for site in self.sites], device=self.comm.device))
        return [site for site, flag in zip(self.sites, flags.tolist(), strict=True) if flag]

    def _resume(self, number: int) -> Site | None:
        """Continues a run to its next stop. None if it has ended."""
        run, self.run = self._runs[number], number
        self._caller.restore()  # autocast and other thread state is shared by all runs and the visitor
        site = run.switch()
        TorchState().restore()
        return None if run.dead else site

    def _visit(self, site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a site's forward: with the old weights to observe, then with the new ones."""
        if self._is_outside_runs():
            return forward(*args, **kwargs)
        if site in self.complete:
            self._note_reentry(site)
        else:
            self._pause(site)
            if site.linears and not site.done:
                if self.run not in self.visitor.dense:
                    self._watched, self._calls = site, []
                    try:
                        if site.module in site.linears.values():
                            self._listen(site, next(iter(site.linears)), site.module, args, kwargs)
                        else:
                            call_with_copies(forward, args, kwargs)
                    except _Observed:
                        pass
                    finally:
                        self._watched = None
                    if site.once is None:
                        site.once = sorted(self._calls) == sorted(site.linears)
                self._pause(site)
        with nullcontext() if self.run in self.visitor.untouched else self._pruned(site):
            return forward(*args, **kwargs)

    def _is_outside_runs(self) -> bool:
        """Returns whether a call is from a visitor or an autograd thread, not from a run."""
        return self._straight or greenlet.getcurrent() not in self._runs

    def _note_reentry(self, site: Site) -> None:
        self.again.add(site)
        self.visitor.on_reentry(site)

    def _pause(self, site: Site) -> None:
        """Switches to other runs until all have arrived."""
        state = TorchState.now()
        self._main.switch(site)
        state.restore()

    def _visit_exit(self, site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a site's forward, stops at its exit, and runs it again with the new weights."""
        if self._is_outside_runs():
            return forward(*args, **kwargs)
        if site in self.complete:
            self._note_reentry(site)
            return forward(*args, **kwargs)
        output = call_with_copies(forward, args, kwargs)
        self._pause(site)
        self.visitor.on_exit(self.run, (args, kwargs), output)
        self._pause(site)
        if self.run in self.visitor.untouched:
            return output
        self._straight = True
        try:
            with self._pruned(site):
                return forward(*args, **kwargs)
        finally:
            self._straight = False

    def _listen(self, site: Site, name: str, linear: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        if self._watched is not site:
            return
        if not args and "input" not in kwargs:  # its forward raises
            return
        state = TorchState.now()
        TorchState().restore()
        try:
            self.visitor.observe(name, linear, args[0] if args else kwargs["input"], self.run)
        finally:
            state.restore()
        self._calls.append(name)
        if site.once and len(self._calls) == len(site.linears):
            raise _Observed

    @contextmanager
    def _pruned(self, site: Site) -> Iterator[None]:
        """Uses the new parameters within the context."""
        if self._pruned_parameters[0] is not site:
            new = self.visitor.parameters(site)
            self._pruned_parameters = (site, {site.linears[name]: parameters for name, parameters in new.items()})
        with replaced(self._pruned_parameters[1]):
            yield


def call_with_copies(forward: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Calls a forward with copies of KV caches, so that the originals do not change."""

    def copied(value: Any) -> Any:  # noqa: ANN401
        return copy.deepcopy(value) if isinstance(value, Cache) else value

    return forward(*map(copied, args), **{name: copied(value) for name, value in kwargs.items()})
