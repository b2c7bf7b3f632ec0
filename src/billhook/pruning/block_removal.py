"""Blocks are removed: the stack, the optimizer's state, numbers and config follow, and the outcome is compared with the skip."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from billhook.model.config_fields import set_fields
from billhook.model.find import find_transformer
from billhook.model.stacks import keep, numbers_of
from billhook.model.surgery import undone_by_errors
from billhook.pruning.block_plan import BlockPlan, check_made_for, plan_blocks
from billhook.running.answers import alike, answer, tolerance
from billhook.units.blocks import Chosen, find_blocks, skipping


def prune_blocks(model: nn.Module, blocks: Chosen, optimizers: Optimizer | Iterable[Optimizer] = ()) -> BlockPlan:
    """Removes whole blocks from a model in place: it computes what it did with these blocks skipped, and is smaller.

    What the class builds from the config then is what is left, so that plain `from_pretrained` loads what `bh.save` writes.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        blocks: The blocks that go: by stack (the name of a module list), or the numbers alone where there is one stack.
        optimizers: The optimizer, or optimizers, that train the model; they lose the parameters that go and their state.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_blocks`, or if the model then computes something else; then nothing has changed.
    """
    plan = plan_blocks(model, blocks)
    _carry_out(plan, model, optimizers)
    return plan


def apply_blocks(plan: BlockPlan, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Args:
        plan: What `plan_blocks` made of the model as it is.
        model: The model.
        optimizers: As in `prune_blocks`.

    Raises:
        ValueError: If the plan is not of this model as it is, or the model then computes something else.
    """
    subject = find_transformer(model)
    check_made_for(plan, subject)
    if plan_blocks(subject, plan.blocks) != plan:
        raise ValueError(f"plan: it is not what plan_blocks makes of this {plan.model}")
    _carry_out(plan, model, optimizers)


def _carry_out(plan: BlockPlan, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    if not plan.blocks:
        return
    subject = find_transformer(model)
    stacks = find_blocks(subject)
    with skipping(stacks, plan.blocks) as runs:
        expected = answer(subject)
    if often := next((key for key, times in runs.items() if times > 1), None):
        raise ValueError(f"blocks: block {often[1]} of {often[0]} runs {runs[often]} times in a forward: its weights are shared")
    with undone_by_errors(subject, optimizers):
        trained = set(model.parameters())
        for name, gone in plan.blocks.items():
            keep(stacks[name], [own for place, own in enumerate(numbers_of(stacks[name])) if place not in gone])
        for name, (before, after) in plan.attributes.items():
            owner, _, attr = name.rpartition(".")
            if getattr(subject.get_submodule(owner), attr, None) == before:
                setattr(subject.get_submodule(owner), attr, after)
        set_fields(subject.config, plan.fields)
        _forget(optimizers, trained - set(model.parameters()))
        if not alike(expected, answer(subject), tolerance(subject)):
            raise ValueError(
                f"blocks: {plan.model} computes something else without {plan.blocks} than it does when they are skipped: later "
                "blocks need them, or count on their own place"
            )


def _forget(optimizers: Iterable[Optimizer], gone: set[nn.Parameter]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone & optimizer.state.keys():
            del optimizer.state[parameter]
