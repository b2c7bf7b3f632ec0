"""Fewer key/value heads in a model whose blocks come from files one at a time."""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.kv_heads.bases.moments import Sums
from billhook.kv_heads.bases.ready import Attentions, by_parameter
from billhook.kv_heads.plan import UNCHANGED, KVHeadPlan, starting
from billhook.model.shapes.shape import note_shape, set_shape
from billhook.model.surgery import replace_parameters
from billhook.running.batches import tell_apart
from billhook.running.overridden import overridden
from billhook.running.undisturbed import undisturbed
from billhook.running.walk import Site, Walk
from billhook.streaming.stream import Stream
from billhook.streaming.together import Nothing


class StreamedConversion:
    """Goes over a dense model once; each block is converted, and written, when all runs have passed it.

    Args:
        stream: Where its blocks come from and go.
        plan: What shrinks.
        batches: What bases are chosen by, on the dense model; without any, the weights say.
    """

    def __init__(self, stream: Stream, plan: KVHeadPlan, batches: Iterable[Any] = ()) -> None:
        self.stream, self.plan, self.model = stream, plan, stream.model
        groups = dict.fromkeys(plan.layers, plan.after)
        self.attentions = Attentions(self.model, groups) if plan.method.turns else None
        if self.attentions is not None:
            (self.rendered,) = self.attentions.allowed(plan.method.candidates)
        self.trials = [] if self.attentions is None else [self.attentions.trial(batch) for batch in batches]
        self.done = stream.begin(f"{plan.to_json()} {tell_apart(self.trials)}")
        self.changes = plan.method.changes(self.model, plan.parameters)
        self.sums: dict[str, Sums] = {}  # of the attentions that are not converted yet
        self.listeners: dict[str, ExitStack] = {}

    def go(self) -> None:
        """Converts all blocks, and then what is in none."""
        with self.stream.undone_by_errors():
            self._blocks()
            self.stream.leave()
        self._convert(None)
        set_shape(self.model, self.plan.shape)
        note_shape(self.model)

    def _blocks(self) -> None:
        blocks = list(self.stream.blocks.values())
        if self.attentions is None or not self.trials:
            for block in blocks:
                self._convert(block)
            return
        sites, ends = [Site(block, {}) for block in blocks], len(self.trials)
        walk = Walk(sites, Nothing(), ends=ends, leave=lambda site: self._convert(site.module))
        with undisturbed(self.model), ExitStack() as stack:
            for name in self.attentions.places:
                self.listeners[name] = stack.enter_context(ExitStack())
                self._listen(name, walk)
            walk([run.visit for run in self.trials])

    def _listen(self, name: str, walk: Walk) -> None:
        """Listens to an attention until it is converted."""
        assert self.attentions is not None
        module, groups = self.model.get_submodule(name), 1 if self.rendered.grouping == "similar" else self.plan.after
        sums = self.sums[name] = Sums(self.model, self.attentions.places[name], [groups])
        self.listeners[name].enter_context(sums.listening())

        def forward(own: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
            sums.masks = self.trials[walk.run].tokens
            return own(*args, **kwargs)

        self.listeners[name].enter_context(overridden(module, forward=partial(forward, module.forward)))

    @torch.no_grad()
    def _convert(self, block: nn.Module | None) -> None:
        """Converts a block, or what is in none; one that an earlier process has done is as that has left it."""
        name = None if block is None else self.stream.names[block]
        if name is not None and name in self.done:
            self.stream.adopt(name)
            self.stream.resize(name, self.plan.shape.tensors)
            return
        if block is not None:
            self.stream.bring(block)
        changes = {own: change for own, change in self.changes.items() if self._block(own) is block}
        for own, values in self._equal(block).items():
            changes[own] = starting(values, changes.get(own, UNCHANGED))
        replace_parameters(self.model, changes)
        if block is not None and changes:
            self.stream.change(block)
            self.stream.leave()

    def _equal(self, block: nn.Module | None) -> dict[str, Tensor]:
        """Returns by parameter the values with which the heads of each group in a block are equal."""
        new = dict[str, dict[str, Tensor]]()
        for name in self.attentions.places if self.attentions is not None else ():
            if self.stream.owner.get(self.model.get_submodule(name)) is block:
                assert self.attentions is not None
                if (own := self.sums.pop(name, None)) is None:
                    moments = self.attentions.weight_moments(name, self.rendered.grouping)
                else:
                    (moments,) = own.moments(None).values()
                    self.listeners.pop(name).close()
                new |= self.attentions.equal_in(name, self.rendered, moments)
        return by_parameter(new)

    def _block(self, parameter: str) -> nn.Module | None:
        return self.stream.owner.get(self.model.get_submodule(parameter.rpartition(".")[0]))
