"""Runs a model on all batches side by side: each rests at every site until all have been there, then all continue.

Every run is the model's own forward, in a greenlet of its own, so that masks, rotary embeddings, states of an encoder and
whatever else one block hands to the next are what the model makes of them; nothing is replayed.
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

Sequential = Literal["block", "layer", "none"]


@dataclass(eq=False)
class Site:
    """A module whose linears are pruned together (a block, one linear, the model), or, without linears, is only waited at."""

    module: nn.Module
    linears: dict[str, nn.Module]
    once: bool | None = None  # whether each of them is called exactly once, as the first run has shown
    twins: Sequence[tuple[str, nn.Module]] = ()  # others with the weight of one of them, which count as calls of it
    out: bool = False  # whether runs rest where they come out of the module, and pass it once more with what is new then
    done: bool = False  # whether its linears' new parameters are known, so that runs only pass them


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model, as `blocks_with` finds them, of all linear layers."""
    return list(blocks_with(model, {module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}))


def separable_blocks(model: nn.Module, parameters: Iterable[tuple[tuple[nn.Module, str], nn.Parameter]]) -> list[nn.Module]:
    """Returns the blocks of a model that have some of these parameters, each named by a module that has it, and share none."""
    holders = defaultdict[nn.Parameter, set[nn.Module]](set)
    for (module, _), parameter in parameters:
        holders[parameter].add(module)
    apart = list[nn.Module]()
    for block in blocks_of(model):
        inside = set(block.modules())
        within = [modules for modules in holders.values() if not inside.isdisjoint(modules)]
        if within and all(modules <= inside for modules in within):
            apart.append(block)
    return apart


def blocks_with(module: nn.Module, linears: set[nn.Module]) -> Iterator[nn.Module]:
    """Yields the elements of outermost module lists in which two or more hold linears.

    Any module has such, and none needs to run; `find_blocks`, which needs a run, finds the same in 274 of 322 small models of
    transformers, and in the others leaves out towers that its inputs do not reach, and stages that change the shape.
    """
    children = list(module.children())
    holding = [child for child in children if not linears.isdisjoint(child.modules())]
    in_turn = not any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children)
    if in_turn and isinstance(module, nn.ModuleList | nn.Sequential) and len(holding) > 1:
        yield from children
        return
    for child in children:
        yield from blocks_with(child, linears)


def find_sites(
    model: nn.Module, linears: Mapping[str, nn.Module], sequential: Sequential, gates: Collection[nn.Module] = ()
) -> list[Site]:
    """Finds the sites where runs rest: blocks and linears outside of them, every linear, or the model as a whole.

    Args:
        model: The model.
        linears: Those to prune, by name, in the order of the model's modules.
        sequential: "block", "layer" or "none".
        gates: Blocks that all runs leave before one enters the next, also where they rest within.
    """
    if sequential == "none":
        return [Site(model, dict(linears))]
    sites: dict[nn.Module, Site] = {}
    blocks = list(blocks_with(model, set(linears.values())))
    owner = {module: block for block in blocks for module in block.modules()}
    for name, linear in linears.items():
        module = owner.get(linear, linear) if sequential == "block" else linear
        sites.setdefault(module, Site(module, {})).linears[name] = linear
    if not gates:
        return list(sites.values())
    for block in gates:
        sites.setdefault(block, Site(block, {}))
    return [sites[module] for module in model.modules() if module in sites]


def with_exits(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Adds to sites of a model, in order, the way out of each block in which some of them have linears."""
    owner = {module: block for block in blocks_of(model) for module in block.modules()}
    ordered = list[Site]()
    for block, within in groupby(sites, key=lambda site: owner.get(site.module)):
        group = list(within)
        inside = {name: linear for site in group for name, linear in site.linears.items() if not site.done}
        ordered += group if block is None or not inside else [*group, Site(block, inside, out=True)]
    return ordered


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments and the keywords of a call."""


class Visitor:
    """The work that is done at sites; what it leaves out does nothing.

    Attributes:
        untouched: The numbers of runs that keep the old parameters to the end, for comparison.
        dense: The numbers of those of them of which nothing is observed.
        ends: How many runs continue to their end when all sites are complete; with one, `again` has all that are called again.
    """

    untouched: Collection[int] = ()
    dense: Collection[int] = ()
    ends = 0

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Notes the call of a linear, or of another with its weight, in a site that is not complete, by a run."""

    def complete(self, site: Site) -> None:
        """Completes a site with linears, at which all runs that come to it, on any rank, have been."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new parameters of a complete site: by linear, by their name in it."""
        del site
        return {}

    def on_exit(self, run: int, given: Arguments, output: object) -> None:
        """Notes the arguments and keywords of a module in a run, and what it gave, at a way out."""

    def on_reentry(self, site: Site) -> None:
        """Is told of a complete site that a run comes to once more."""

    def leave(self, site: Site) -> None:
        """Is told of a site that all runs have passed, on any rank."""


class _Observed(BaseException):  # no `Exception`, which code of a model might catch
    """All linears of a site have been called; the rest of its forward would be for nothing."""


class Walk:
    """The runs, side by side; whatever they or the caller have set, the visitor is called in the state of `TorchState()`.

    Args:
        sites: Where they rest.
        visitor: What is done there.
        comm: The ranks, each of which has runs of its own: all complete the same sites in the same order, also
            those that no run of their own comes to.
        enter: Called with the module of each site before runs go on within it, on all ranks, as to load its block.
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
        self._run, self._straight, self._runs = 0, False, list[greenlet]()
        self._pruned_parameters: tuple[Site | None, Mapping[nn.Module, Mapping[str, Tensor]]] = (None, {})
        self._caller = TorchState.now()

    @property
    def run(self) -> int:
        """The number of the run that is going on."""
        return self._run

    def __call__(self, forwards: Iterable[Callable[[], object]]) -> list[str]:
        """Goes all the way with forwards of the model, and returns the linears that no run has called.

        Sites that a run has come to once more, after they were complete, are in `again`: these calls were not observed.
        """
        self._main, self._caller = greenlet.getcurrent(), TorchState.now()
        self._runs = [greenlet(forward) for forward in forwards]
        try:
            with self._installed():
                self._go()
                self.again = set(self._on_any_rank(self.again))
        finally:
            for run in self._runs:
                run.throw()  # ends those that still rest, also after an error, and with them what their frames hold
            self._caller.restore()
        return [name for site in self.sites if site not in self.complete for name in site.linears]

    def _go(self) -> None:
        waiting = [self._resume(number) for number in range(len(self._runs))]  # the site at which each run waits
        # the first of all sites at which one does on any rank, so that ranks whose runs take other ways complete the same
        while reached := self._on_any_rank(set(waiting)):
            site = reached[0]
            arrived = [number for number, other in enumerate(waiting) if other is site]
            self._enter(site)
            if site.linears and not site.done:
                for number in arrived:
                    self._resume(number)  # which observes the linears, and comes back to the same site
                self.visitor.complete(site)
                self._enter(site)  # a visitor may have loaded another block meanwhile
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
        """Returns those of all sites that some rank names, in their order; all ranks call it together."""
        flags = self.comm(torch.tensor([float(site in sites) for site in self.sites], device=self.comm.device))
        return [site for site, flag in zip(self.sites, flags.tolist(), strict=True) if flag]

    def _resume(self, number: int) -> Site | None:
        """Lets a run continue to where it rests next; None if that is its end."""
        run, self._run = self._runs[number], number
        self._caller.restore()  # autocast and the like are the thread's, which all runs share with the visitor
        site: Site = run.switch()
        TorchState().restore()
        return None if run.dead else site

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Overrides the forwards of sites, and listens to linears."""
        with ExitStack() as stack:
            for site in self.sites:
                visit = self._come_out if site.out else self._visit
                stack.enter_context(overridden(site.module, forward=partial(visit, site, site.module.forward)))
                for name, linear in (*site.linears.items(), *site.twins):
                    hook = partial(self._listen, site, name)
                    stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _visit(self, site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a site's forward: when all are here, with the old weights, to observe; when all have, with the new ones."""
        if self._is_straight():
            return forward(*args, **kwargs)
        if site in self.complete:
            self._come_again(site)
        else:
            self._rest(site)
            if site.linears and not site.done:
                if self._run not in self.visitor.dense:
                    self._observe(site, forward, args, kwargs)
                self._rest(site)
        with nullcontext() if self._run in self.visitor.untouched else self._pruned(site):
            return forward(*args, **kwargs)

    def _is_straight(self) -> bool:
        """Tells whether a call is none of a run: a visitor's, or one from another thread, as autograd's that computes again."""
        return self._straight or greenlet.getcurrent() not in self._runs

    def _come_again(self, site: Site) -> None:
        self.again.add(site)
        self.visitor.on_reentry(site)

    def _rest(self, site: Site) -> None:
        """Lets others go on until all are here."""
        state = TorchState.now()
        self._main.switch(site)
        state.restore()

    def _come_out(self, site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs a site's forward, rests where it ends, and runs it again, straight through, with the new weights."""
        if self._is_straight():
            return forward(*args, **kwargs)
        if site in self.complete:
            self._come_again(site)
            return forward(*args, **kwargs)
        output = forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
        self._rest(site)
        self.visitor.on_exit(self._run, (args, kwargs), output)
        self._rest(site)
        if self._run in self.visitor.untouched:
            return output
        self._straight = True
        try:
            with self._pruned(site):
                return forward(*args, **kwargs)
        finally:
            self._straight = False

    def _observe(self, site: Site, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:  # noqa: ANN401
        self._watched, self._calls = site, []
        try:
            if site.module in site.linears.values():
                self._listen(site, next(iter(site.linears)), site.module, args, kwargs)
            else:
                forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
        except _Observed:
            pass
        finally:
            self._watched = None
        if site.once is None:
            site.once = sorted(self._calls) == sorted(site.linears)

    def _listen(self, site: Site, name: str, linear: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        if self._watched is not site:
            return
        if not args and "input" not in kwargs:  # its forward refuses that
            return
        state = TorchState.now()
        TorchState().restore()
        try:
            self.visitor.observe(name, linear, args[0] if args else kwargs["input"], self._run)
        finally:
            state.restore()
        self._calls.append(name)
        if site.once and len(self._calls) == len(site.linears):
            raise _Observed

    @contextmanager
    def _pruned(self, site: Site) -> Iterator[None]:
        """Puts the new parameters instead of the old ones, which come back."""
        if self._pruned_parameters[0] is not site:
            new = self.visitor.parameters(site)
            self._pruned_parameters = (site, {site.linears[name]: parameters for name, parameters in new.items()})
        with replaced(self._pruned_parameters[1]):
            yield


def copy_cache(value: Any) -> Any:  # noqa: ANN401
    """Copies a key-value cache, so that it may be written to before the forward proper fills its own."""
    return copy.deepcopy(value) if isinstance(value, Cache) else value
