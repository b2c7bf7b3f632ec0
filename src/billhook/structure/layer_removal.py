"""Blocks are removed: the stack, the optimizer's state, numbers and config follow, and the outcome is compared with the skip."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from billhook.structure.answer import alike, answer, tolerance
from billhook.structure.block_choice import Quota, choose_lowest
from billhook.structure.block_fields import Fields, Numbers, find_then, set_fields
from billhook.structure.layers import Chosen, block_of, check_blocks, find_blocks, skipping
from billhook.structure.shape import find_transformer, shape_of
from billhook.structure.stacks import keep, numbers_of, snapshot


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks go; `print` shows a table.

    Attributes:
        model: The model's class.
        made_for: A digest of the names and sizes of the model's tensors, and of which blocks it has lost before.
        blocks: The blocks that go, by stack.
        before: By stack, how many blocks there are.
        fields: What fields of the config become, those of nested configs with dots.
        attributes: The attributes that number blocks, by their names then: what they are before, and then.
        parameters: How many parameters there are, before and then.
        scores: By stack, how important each block was found; only shown.
    """

    model: str
    made_for: str
    blocks: dict[str, list[int]]
    before: dict[str, int]
    fields: Fields
    attributes: Numbers
    parameters: tuple[int, int]
    scores: dict[str, list[float]] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_json` made, also after it was written and read again."""
        attributes = {name: (before, after) for name, (before, after) in plain["attributes"].items()}
        before, after = plain["parameters"]
        return cls(**{**plain, "attributes": attributes, "parameters": (before, after)})

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"]
        width = max(map(len, self.before))
        for name, count in self.before.items():
            gone, scores = self.blocks.get(name, []), self.scores.get(name)
            told = ", ".join(f"{number} ({scores[number]:.4g})" if scores else str(number) for number in gone) or "none"
            lines.append(f"  {name:<{width}}  {count} -> {count - len(gone)} blocks; without {told}")
        return "\n".join(lines)


def plan_blocks(
    model: nn.Module,
    blocks: Chosen | None = None,
    count: int | None = None,
    ratio: float | None = None,
    importance: Mapping[str, Tensor] | None = None,
    first: int = 0,
    last: int = 0,
) -> BlockPlan:
    """Finds what goes with some blocks, and how the model and its config are told.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        blocks: The blocks that go: by stack (the name of a module list), or the numbers alone where there is one stack.
        count: Instead of `blocks`, how many of each stack in `importance` go: those of least importance.
        ratio: Instead of `count`, the fraction of each stack that goes, in [0, 1), rounded down.
        importance: By stack, how much each block matters: `[blocks]`, as `block_importance` gives it.
        first: Of each stack so many first blocks stay.
        last: Of each stack so many last blocks stay.

    Raises:
        ValueError: If there is no such block, a stack would be left without blocks, protected blocks would go, or the config has
            no fields that say which blocks are left; the message says why and what is legal.
    """
    subject = find_transformer(model)
    stacks = find_blocks(subject)
    if sum(given is not None for given in (blocks, count, ratio)) != 1:
        raise ValueError("blocks: give blocks, or count, or ratio: one of them")
    if blocks is None:
        if importance is None:
            raise ValueError("importance: count and ratio need the importance of blocks (block_importance)")
        for name, own in importance.items():
            if name not in stacks:
                raise ValueError(f"importance: there is no stack {name!r}; there are {', '.join(stacks)}")
            if len(own) != len(stacks[name]):
                raise ValueError(f"importance: {name} has {len(stacks[name])} blocks, and {len(own)} scores")
        blocks = choose_lowest(importance, Quota(count, ratio, first, last))
    chosen = check_blocks(stacks, blocks)
    for name, numbers in chosen.items():
        free = range(first, len(stacks[name]) - last)
        if kept := [number for number in numbers if number not in free]:
            raise ValueError(f"blocks: block {kept[0]} of {name} is protected by first={first} and last={last}")
    _check_own(subject, stacks, chosen)
    before = {name: len(stack) for name, stack in stacks.items()}
    then = find_then(subject, before, chosen) if chosen else None
    sizes = {id(p): p.numel() for p in subject.parameters()}
    gone = {id(p): p.numel() for name, own in chosen.items() for number in own for p in stacks[name][number].parameters()}
    total = sum(sizes.values())
    scores = {name: [float(value) for value in own] for name, own in (importance or {}).items()}
    return BlockPlan(
        type(subject).__name__,
        _digest(subject),
        chosen,
        before,
        then.fields if then else {},
        then.attributes if then else {},
        (total, total - sum(gone.values())),
        scores,
    )


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
    if (plan.model, plan.made_for) != (type(subject).__name__, _digest(subject)):
        told, has = (
            ", ".join(f"{count} blocks in {name}" for name, count in counts.items())
            for counts in (plan.before, {name: len(stack) for name, stack in find_blocks(subject).items()})
        )
        raise ValueError(
            f"plan: it was made for a {plan.model} with {told}; this {type(subject).__name__} has {has}, or other tensors"
        )
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
    with _undone_by_errors(subject, optimizers):
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


@contextmanager
def _undone_by_errors(model: PreTrainedModel, optimizers: list[Optimizer]) -> Iterator[None]:
    """Puts back model and optimizers if an error is raised within."""
    restore = snapshot(model)
    numbers = [(vars(m), {name: value for name, value in vars(m).items() if type(value) is int}) for m in model.modules()]
    configs = [(vars(config), dict(vars(config))) for config in _configs(model.config)]
    groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
    states = [(optimizer, dict(optimizer.state)) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        restore()
        for attributes, before in numbers + configs:
            attributes.update(before)
        for group, params in groups:
            group["params"][:] = params
        for optimizer, state in states:
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    nested = [own for value in vars(config).values() if isinstance(value, PretrainedConfig) for own in _configs(value)]
    return [config, *nested]


def _check_own(model: nn.Module, stacks: Mapping[str, nn.ModuleList], gone: Mapping[str, list[int]]) -> None:
    """Refuses blocks that share parameters with what stays."""
    places = [(name, id(p), block_of(name, stacks)) for name, p in model.named_parameters(remove_duplicate=False)]
    going = {(name, number) for name, numbers in gone.items() for number in numbers}
    stay = {own: name for name, own, block in places if block not in going}
    if shared := next(((block, stay[own]) for _, own, block in places if block in going and own in stay), None):
        block, name = shared
        raise ValueError(f"blocks: block {block[1]} of {block[0]} shares weights with {name}, which stays")


def _digest(model: PreTrainedModel) -> str:
    shape = shape_of(model).to_dict()
    return hashlib.sha256(json.dumps([shape["tensors"], shape["blocks"]], sort_keys=True).encode()).hexdigest()[:16]
