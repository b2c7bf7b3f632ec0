"""Fewer key/value heads in a model whose blocks come from files one at a time."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from billhook.engine.files import Stream
from billhook.engine.lazy import itself
from billhook.kv_heads.plan import UNCHANGED, KVHeadPlan, starting
from billhook.model.shapes.shape import note_shape, set_shape
from billhook.model.surgery import change_values


class StreamedConversion:
    """Converts a model block by block, and writes each.

    Args:
        stream: Where its blocks come from and go.
        plan: What shrinks.
        new: By linear, the parameters that it starts from, as those with which the heads of each group are equal.
        key: What tells these from all others.
    """

    def __init__(self, stream: Stream, plan: KVHeadPlan, new: Mapping[str, Mapping[str, Tensor]], key: str) -> None:
        self.stream, self.plan, self.new, self.model = stream, plan, new, stream.model
        self.done = stream.begin(f"{plan.to_json()} {key}")
        self.changes = plan.method.changes(self.model, plan.parameters)

    def go(self) -> None:
        """Converts all blocks, and then what is in none."""
        with self.stream.undone_by_errors():
            for block in self.stream.blocks.values():
                self._convert(block)
            self.stream.leave()
        self._convert(None)
        set_shape(self.model, self.plan.shape)
        note_shape(self.model)

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
        changes = {own: change for own, change in self.changes.items() if self._block(own.rpartition(".")[0]) is block}
        for linear in (one for one in self.new if self._block(one) is block):
            for part, values in self.new[linear].items():
                changes[f"{linear}.{part}"] = starting(partial(itself, values), changes.get(f"{linear}.{part}", UNCHANGED))
        change_values(self.model, changes)
        if block is not None and changes:
            self.stream.change(block)
            self.stream.leave()

    def _block(self, module: str) -> nn.Module | None:
        return self.stream.owner.get(self.model.get_submodule(module))
