"""The attentions of a model whose blocks come from files: bases are found on the way through it, and new weights lie in files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.batches import Run, tell_apart
from billhook.engine.files import Stream
from billhook.engine.lazy import Aside, by_module, itself
from billhook.engine.parts import tensor_in
from billhook.engine.passes import Together
from billhook.engine.state import overridden, undisturbed
from billhook.kv_heads.bases.distance import distance_between
from billhook.kv_heads.bases.moments import Moments
from billhook.kv_heads.bases.passing import Passing
from billhook.kv_heads.bases.ready import Attentions, may_group
from billhook.kv_heads.bases.stacks import instead
from billhook.kv_heads.methods.base import KVMethod, Rendered
from billhook.repairs.in_turn import Refitted
from billhook.repairs.repair import Repair
from billhook.repairs.visitor import Given


class StreamedAttentions(Attentions):
    """The attentions of a streamed model that are to have fewer KV heads; what becomes of them lies in files."""

    def __init__(self, stream: Stream, groups: Mapping[str, int]) -> None:
        super().__init__(stream.model, groups)
        self.stream = stream

    def passes(self, method: KVMethod, repair: Repair | None) -> int:
        """Returns how often the blocks are read until heads are equal."""
        each = 1 if repair is None else 3  # one to see what is called, one to refit
        if len(method.candidates) == 1:
            return each
        tried = [one for one in self.allowed(method.candidates) if one.grouping == "consecutive" or may_group(self)]
        return len({one.grouping for one in tried}) + len(tried) * each + each

    def bytes(self, method: KVMethod) -> int:
        """Returns the bytes of the largest moments of an attention, with those that are computed of them."""
        similar, most = any(one.grouping == "similar" for one in method.candidates), 0
        for name, place in self.places.items():
            groups = 1 if similar else self.groups[name]
            keys, values = (place.kv_heads * rows.index.shape[1] for rows in (place.k, place.v))
            most = max(most, groups * ((keys // groups) ** 2 + (values // groups) ** 2))
        return 2 * 8 * most

    def rendered(self, methods: Sequence[Rendered], trials: Sequence[Run]) -> Iterator[tuple[Rendered, Aside]]:
        """Yields for each of some methods, which group heads alike, where the new parameters lie; one pass writes all of them."""
        stream, grouping = self.stream, methods[0].grouping
        done = stream.begin(f"heads of {self.groups} by {methods} {tell_apart(trials)}")
        left = {name: self._block(name) for name in self.places if self._block(name) not in done}
        passing = Passing(self, grouping, trials, left)

        def write(module: nn.Module) -> None:
            block = stream.names[module]
            if own := [name for name, inside in left.items() if inside == block]:
                stream.bring(module)
                stream.written.write(block, self._written(methods, {name: passing.moments(name) for name in own}), None)

        if trials and left:
            with stream.undone_by_errors():
                passing.go(Together(self.model, write))
        else:
            for module in stream.blocks.values():
                write(module)
        here = self._written(methods, {name: passing.moments(name) for name, inside in left.items() if inside is None})
        reads = {key: partial(itself, value) for key, value in here.items()}
        for block in dict.fromkeys(inside for name in self.places if (inside := self._block(name)) is not None):
            path = stream.written.path(block)
            reads |= {key: partial(tensor_in, path, key) for key in stream.written.keys(block)}
        for number, method in enumerate(methods):
            yield method, Aside(by_module({key: read for key, read in reads.items() if key.startswith(f"{number} ")}))

    def repaired(self, new: Given, trials: Sequence[Run], repair: Repair) -> Aside:
        """Returns the same, with linears behind attentions and feed-forwards refitted, in files of another step."""
        assert isinstance(new, Aside), "they are in memory"
        found = self._refitted(new, trials, repair)
        assert isinstance(found, Refitted), "the model is in memory"
        return Aside(by_module(found.reads)).over(new)

    @torch.no_grad()
    def distance(self, new: Given, trials: Sequence[Run]) -> float:
        """Returns how far the outputs with other parameters are from the model's own; both go through its blocks side by side."""
        last, expected, distances = list(self.places.values())[-1].o.linear, list[Any](), list[float]()
        here = dict[str, Mapping[str, Tensor]]()  # the new parameters of the block that computes
        together = Together(self.model, lambda _: here.clear())

        def changed(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if not together.now % 2:
                return forward(*args, **kwargs)
            if name not in here:
                here[name] = new[name]
            with instead(self.model, {name: here[name]}):
                return forward(*args, **kwargs)

        def compare(trial: Run) -> None:
            found = trial.visit()
            if together.now % 2:
                distances.append(distance_between(expected.pop(), found, trial.tokens.get(last)))
            else:
                expected.append(found)

        with undisturbed(self.model), ExitStack() as stack:
            for name in new:
                linear = self.model.get_submodule(name)
                stack.enter_context(overridden(linear, forward=partial(changed, name, linear.forward)))
            together([partial(compare, trial) for trial in trials for _ in range(2)])
        total, count = self.summed(sum(distances), len(trials))
        return total / count

    def _block(self, name: str) -> str | None:
        """Returns the name of the block that an attention is in; None of one that stays in memory."""
        block = self.stream.owner.get(self.model.get_submodule(name))
        return None if block is None else self.stream.names[block]

    def _written(self, methods: Sequence[Rendered], moments: Mapping[str, Moments]) -> dict[str, Tensor]:
        """Returns the new parameters of some attentions, by the number of the method and the name of the parameter."""
        return {
            f"{number} {linear}.{part}": value
            for number, method in enumerate(methods)
            for linear, own in self.equal(method, moments).items()
            for part, value in own.items()
        }
