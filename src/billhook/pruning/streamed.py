"""Removes units from a model whose blocks come and go one at a time: from files, or from the ranks that share them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.files import FileStore
from billhook.engine.store import store_of
from billhook.model.plan import Weights, check_weights, starting_from
from billhook.model.surgery import Change, change_values
from billhook.units.units import UnitKind, Units
from billhook.units.zero import reading


def check_kinds(model: nn.Module, kinds: Collection[UnitKind]) -> None:
    """Refuses residual channels together with heads or channels, of a model that is streamed.

    These are compared with their mask in the model without the residual channels, of which there would be two on files.
    """
    if "residual" in kinds and {"head", "channel"} & set(kinds) and store_of(model).in_files:
        raise ValueError(
            "residual: the model is streamed, and loses these channels, or heads and channels within blocks, not both at once: "
            "remove one kind after the other, or all in memory"
        )


@contextmanager
def taking(model: PreTrainedModel, weights: Weights | None) -> Iterator[None]:
    """Gives parameters new values, as `starting_from` does; those of blocks that are streamed whenever these come."""
    check_weights(model, weights)
    store, weights = store_of(model), weights or {}
    inside = {name for name in weights if store.block_of(name) is not None}
    rest = {name: weights[name] for name in weights if name not in inside} if inside else weights
    with starting_from(model, rest), store.altered(partial(_take, model, weights)) if inside else nullcontext():
        yield


@contextmanager
def zeros_in_blocks(model: PreTrainedModel, found: Mapping[str, Units], gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Has the weights of blocks that come and go be zero where they read some units, within."""
    with store_of(model).altered(partial(_zero, model, found, gone)):
        yield


def cut_blocks(store: FileStore, changes: Mapping[str, Change], sizes: Mapping[str, tuple[int, ...]], key: str) -> None:
    """Cuts the parameters of each block and writes it; blocks that an earlier process has cut are as it has left them.

    Args:
        store: Where blocks come from and go.
        changes: How parameters change, by name; those of no block are left out.
        sizes: Those of all tensors afterwards.
        key: What tells this work from all other.
    """
    with store.step(key):
        for name, block in store.blocks.items():
            if store.known(block) is not None:
                store.adopt(name)
                store.resize(name, sizes)
                continue
            store.load(block)
            change_values(store.model, {own: change for own, change in changes.items() if store.block_of(own) is block})
            store.change(block)
            store.release()


def reading_outside(
    model: nn.Module, found: Mapping[str, Units], gone: Mapping[str, Sequence[int]]
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Yields what reads some units, as `reading` does, in no block that comes and goes."""
    inside = {id(parameter) for block in store_of(model).blocks.values() for parameter in block.parameters()}
    yield from (one for one in reading(model, found, gone) if id(one[0]) not in inside)


@torch.no_grad()
def _take(model: nn.Module, weights: Weights, block: nn.Module) -> list[nn.Parameter]:
    """Puts new values into parameters of a block, and returns these."""
    inside = {id(parameter) for parameter in block.parameters()}
    own = {name: one for name, one in model.named_parameters() if id(one) in inside and name in weights}
    for name, parameter in own.items():
        parameter.copy_(weights[name])
    return list(own.values())


@torch.no_grad()
def _zero(
    model: nn.Module, found: Mapping[str, Units], gone: Mapping[str, Sequence[int]], block: nn.Module
) -> list[nn.Parameter]:
    """Has what reads some units in a block be zero, and returns these parameters."""
    inside = {id(parameter) for parameter in block.parameters()}
    own = [(weight, dim, positions) for weight, dim, positions in reading(model, found, gone) if id(weight) in inside]
    for weight, dim, positions in own:
        weight.index_fill_(dim, positions, 0)
    return [weight for weight, _, _ in own]
