"""Refits the linears of a model whose blocks come from files; the new weights stay in files."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from billhook.engine.files import Stream
from billhook.engine.lazy import itself
from billhook.engine.parts import tensor_in
from billhook.engine.passes import shelf
from billhook.repairs.in_turn import Parameters, Reads, Refitted, RepairInTurn, by_parameter
from billhook.repairs.visitor import RepairVisitor


class InFiles:
    """Writes what becomes of each block's linears, unless an earlier process has.

    Args:
        stream: Where the blocks come from; they stay as they are.
        key: What tells this work from all other.
    """

    told = ""

    def __init__(self, stream: Stream, key: str) -> None:
        self.stream, self.done = stream, stream.begin(key)

    def known(self, block: nn.Module) -> dict[str, dict[str, Tensor] | None]:
        """Returns what an earlier process has made of the linears of a block; None for one that it left without a refit."""
        name, known = self.stream.names[block], dict[str, dict[str, Tensor] | None]()
        if name in self.done:
            found = load_file(self.stream.written.path(name))
            for linear, refitted in self.done[name].items():
                parts = {part: found[f"{linear}.{part}"] for part in ("weight", "bias") if f"{linear}.{part}" in found}
                known[linear] = parts if refitted else None
        return known

    @torch.no_grad()
    def put(self, block: nn.Module | None, new: Parameters, refitted: Mapping[str, bool]) -> Reads:
        """Writes the new parameters of a block's linears; those in no block stay in memory."""
        tensors = by_parameter(new)
        if block is None:
            return {name: partial(itself, value) for name, value in tensors.items()}
        if (name := self.stream.names[block]) not in self.done:
            self.stream.written.write(name, tensors, dict(refitted))
        return {own: partial(tensor_in, self.stream.written.path(name), own) for own in tensors}


def refit_streamed(
    stream: Stream,
    visitor: RepairVisitor,
    linears: Mapping[str, nn.Module],
    kept: Collection[str],
    key: str,
    forwards: Sequence[Callable[[], object]],
    untouched: Collection[int],
) -> Refitted:
    """Goes over blocks up to the last that has such linears; of those that an earlier process has done, it takes what is there.

    Args:
        stream: Where its blocks come from; they stay as they are.
        visitor: What refits linears.
        linears: All linears that are looked at, by name.
        kept: The names of those that are refitted.
        key: What tells this work from all other.
        forwards: The runs.
        untouched: The numbers of those that keep the old parameters.
    """
    rest = InFiles(stream, key)
    with stream.undone_by_errors(), shelf(stream) as visitor.shelf:
        refits = RepairInTurn(stream.model, stream, rest, visitor, linears, kept)
        sites = refits.sites()
        last = max(number for number, site in enumerate(sites) if site.linears)
        return refits.go(sites[: last + 1], forwards, untouched)  # blocks after the last such linear need not be read
