"""Fewer key/value heads in a model whose blocks come from files one at a time."""

import torch
from torch import nn

from billhook.engine.files import FileStore
from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.plan import UNCHANGED, KVHeadPlan, starting
from billhook.model.shapes.shape import note_shape, set_shape
from billhook.model.surgery import change_values


class StreamedConversion:
    """Converts a model block by block, and writes each.

    Args:
        store: Where its blocks come from and go.
        plan: What shrinks.
        new: The parameters that linears start from, as those with which the heads of each group are equal.
        key: What tells these from all others.
    """

    def __init__(self, store: FileStore, plan: KVHeadPlan, new: LazyTensors, key: str) -> None:
        self.store, self.plan, self.new, self.model = store, plan, new, store.model
        self.key = f"{plan.to_json()} {key}"
        self.changes = plan.method.changes(self.model, plan.parameters)

    def go(self) -> None:
        """Converts all blocks, and then what is in none."""
        with self.store.step(self.key):
            for block in self.store.blocks.values():
                self._convert(block)
            self.store.release()
        self._convert(None)
        set_shape(self.model, self.plan.shape)
        note_shape(self.model)

    @torch.no_grad()
    def _convert(self, block: nn.Module | None) -> None:
        """Converts a block, or what is in none; one that an earlier process has done is as that has left it."""
        if block is not None and self.store.known(block) is not None:
            self.store.adopt(self.store.names[block])
            self.store.resize(self.store.names[block], self.plan.shape.tensors)
            return
        if block is not None:
            self.store.load(block)
        changes = {name: change for name, change in self.changes.items() if self.store.block_of(name) is block}
        for name in (name for name in self.new if self.store.block_of(name) is block):
            changes[name] = starting(self.new.reads[name], changes.get(name, UNCHANGED))
        change_values(self.model, changes)
        if block is not None and changes:
            self.store.change(block)
            self.store.release()
