"""One pass of runs over a model, in which the moments of an attention are there until its block has been left."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from billhook.engine.batches import Run
from billhook.engine.passes import Together
from billhook.engine.state import overridden, undisturbed
from billhook.engine.walk import Reduce
from billhook.kv_heads.bases.moments import Moments, Sums
from billhook.kv_heads.bases.ready import Attentions
from billhook.kv_heads.methods.base import Grouping


class Passing:
    """One pass of runs over a model as it is, in which each block is left with the moments of its attentions.

    Args:
        attentions: All attentions.
        grouping: Which heads are to share a group.
        trials: The runs; without any, the weights alone say how heads vary.
        names: The attentions to listen to.
        reduce: Sums over ranks.
    """

    def __init__(
        self,
        attentions: Attentions,
        grouping: Grouping,
        trials: Sequence[Run],
        names: Collection[str],
        reduce: Reduce | None = None,
    ) -> None:
        self.attentions, self.grouping, self.trials, self.names, self.reduce = attentions, grouping, trials, names, reduce
        self.sums: dict[str, Sums] = {}  # of the attentions that have not been left yet
        self.listeners: dict[str, ExitStack] = {}

    def go(self, together: Together) -> None:
        """Goes over all blocks."""
        with undisturbed(self.attentions.model), ExitStack() as stack:
            for name in self.names:
                self.listeners[name] = stack.enter_context(ExitStack())
                self._listen(name, together)
            together([run.visit for run in self.trials])

    def _listen(self, name: str, together: Together) -> None:
        """Listens to an attention from its first call until its block is left, as what is added up takes memory."""
        module = self.attentions.model.get_submodule(name)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
            if name not in self.sums:
                self.sums[name] = self._sums(name)
                self.listeners[name].enter_context(self.sums[name].listening())
                return module.forward(*args, **kwargs)
            self.sums[name].masks = self.trials[together.now].tokens
            return inner(*args, **kwargs)

        self.listeners[name].enter_context(overridden(module, forward=partial(forward, module.forward)))

    def _sums(self, name: str) -> Sums:
        own = self.attentions
        return Sums(own.model, own.places[name], [1 if self.grouping == "similar" else own.groups[name]])

    def moments(self, name: str) -> Moments:
        """Returns the moments of an attention, whose block has been left, and lets go of what they were added up in."""
        if name not in self.listeners:
            return self.attentions.weight_moments(name, self.grouping)
        self.listeners.pop(name).close()
        (moments,) = (self.sums.pop(name, None) or self._sums(name)).moments(self.reduce).values()
        return moments
