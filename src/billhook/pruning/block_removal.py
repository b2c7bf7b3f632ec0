"""Removes blocks: the stack, the optimizer's state, numbers and config follow, and the outcome is compared with the skip."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.model.answers import alike, answer, tolerance
from billhook.model.config_fields import set_fields
from billhook.model.shapes.stacks import keep, numbers_of
from billhook.model.surgery import undone_by_errors
from billhook.pruning.block_fields import Then
from billhook.units.blocks import skipping


def remove_blocks(model: PreTrainedModel, blocks: Mapping[str, list[int]], then: Then, optimizers: list[Optimizer]) -> None:
    """Removes blocks, by stack, from a model, in place; the model and the optimizers are as before if that fails.

    Raises:
        ValueError: If a block runs several times, or the model then computes something else than with the blocks skipped.
    """
    if not blocks:
        return
    with skipping(model, blocks) as runs:
        expected = answer(model)
    if often := next((key for key, times in runs.items() if times > 1), None):
        raise ValueError(f"blocks: block {often[1]} of {often[0]} runs {runs[often]} times in a forward: its weights are shared")
    with undone_by_errors(model, optimizers):
        trained = set(model.parameters())
        for name, gone in blocks.items():
            stack = model.get_submodule(name)
            assert isinstance(stack, nn.ModuleList)
            keep(stack, [own for place, own in enumerate(numbers_of(stack)) if place not in gone])
        for name, (before, after) in then.attributes.items():
            owner, _, attr = name.rpartition(".")
            if getattr(model.get_submodule(owner), attr, None) == before:
                setattr(model.get_submodule(owner), attr, after)
        set_fields(model.config, then.fields)
        _forget(optimizers, trained - set(model.parameters()))
        if not alike(expected, answer(model), tolerance(model)):
            raise ValueError(
                f"blocks: {type(model).__name__} computes something else without {blocks} than it does when they are skipped: "
                "later blocks need them, or count on their own place"
            )


def _forget(optimizers: Iterable[Optimizer], gone: set[nn.Parameter]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone & optimizer.state.keys():
            del optimizer.state[parameter]
