"""Refits the linears of a model whose blocks come from files, one block after the other; the new weights stay in files."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from billhook.repairs.visitor import RepairVisitor
from billhook.running.walk import Site, Walk, find_sites
from billhook.streaming.parts import tensor_in
from billhook.streaming.stream import Stream
from billhook.streaming.together import shelf


class Refitted(Mapping[str, Tensor]):
    """New values of parameters, by the parameter's name: some here, those of blocks in files, read one at a time."""

    def __init__(self, here: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
        self._here, self._files = here, files

    def __getitem__(self, name: str) -> Tensor:
        """Returns the values of one parameter."""
        if name in self._here:
            return self._here[name]
        return tensor_in(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._here, *self._files])

    def __len__(self) -> int:
        return len(self._here) + len(self._files)


class StreamedRepair:
    """One walk over a model that is streamed, in which each block's refitted linears are written when all runs have passed it.

    Args:
        stream: Where its blocks come from; they stay as they are.
        visitor: What refits linears.
        linears: All linears that are looked at, by name.
        kept: The names of those that are refitted.
        key: What tells this work from all other.
    """

    def __init__(
        self, stream: Stream, visitor: RepairVisitor, linears: Mapping[str, nn.Module], kept: Collection[str], key: str
    ) -> None:
        self.stream, self.visitor, self.linears, self.kept = stream, visitor, linears, kept
        self.done = stream.begin(key)
        self.block: nn.Module | None = None
        self.files = dict[str, Path]()

    def go(self, forwards: Sequence[Callable[[], object]], untouched: Collection[int]) -> Refitted:
        """Goes over all blocks that have such linears; of those that an earlier process has done, it takes what is there."""
        outside = self._inside(None)
        self.visitor.take(outside)
        with self.stream.undone_by_errors(), shelf(self.stream) as keep:
            self.visitor.keep = keep
            Walk(self._sites(), self.visitor, keep=keep, untouched=untouched, around=self._there)(forwards)
            self._pass()
            self.stream.leave()
        return Refitted(self._new(outside), self.files)

    def _sites(self) -> list[Site]:
        """Finds where runs rest: at each linear, and at each block up to the last of them."""
        found = find_sites(self.stream.model, self.linears, "layer", gates=True)
        found += [Site(block, {}) for block in set(self.stream.owner.values()) - {site.module for site in found}]
        place = {module: number for number, module in enumerate(self.stream.model.modules())}
        found.sort(key=lambda site: place[site.module])
        last = max(number for number, site in enumerate(found) if site.linears)
        return found[: last + 1]

    @contextmanager
    def _there(self, module: nn.Module) -> Iterator[None]:
        """Has the block of a module in memory; another one, which all runs have passed, is written first."""
        block = self.stream.owner.get(module)
        if block is not None and block is not self.block:
            self._pass()
            self.block = self.stream.bring(module)
            self.visitor.take(self._inside(block))
            if (name := self.stream.names[block]) in self.done:
                self._know(name)
        elif block is not None:
            self.stream.bring(block)
        yield

    def _pass(self) -> None:
        """Writes what the linears of a block become, unless an earlier process has, and lets go of it."""
        if (block := self.block) is None:
            return
        name, inside = self.stream.names[block], self._inside(block)
        new, self.block = self._new(inside), None
        if name not in self.done:
            refitted = {linear: not self.visitor.left[linear] for linear in inside if linear in self.kept}
            self.stream.written.write(name, new, refitted)
        self.files |= dict.fromkeys(new, self.stream.written.path(name))
        self.visitor.drop(inside)

    def _know(self, name: str) -> None:
        """Tells the visitor what an earlier process has made of the linears of a block."""
        found = load_file(self.stream.written.path(name))
        for linear, refitted in self.done[name].items():
            parts = {part: found[f"{linear}.{part}"] for part in ("weight", "bias") if f"{linear}.{part}" in found}
            self.visitor.know(linear, parts if refitted else None)

    def _inside(self, block: nn.Module | None) -> list[str]:
        return [name for name, linear in self.linears.items() if self.stream.owner.get(linear) is block]

    @torch.no_grad()
    def _new(self, names: Collection[str]) -> dict[str, Tensor]:
        own = {name: self.visitor.own(name) for name in names if name in self.kept}
        return {f"{name}.{part}": value for name, parts in own.items() for part, value in parts.items()}
