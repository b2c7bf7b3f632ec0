"""Which blocks go, and how model and config are told: a plan, checked before anything changes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.model.config_fields import Fields
from billhook.model.find import find_transformer
from billhook.model.shape import shape_of
from billhook.pruning.block_choice import Quota, choose_lowest
from billhook.pruning.block_fields import Numbers, Then, find_then
from billhook.units.blocks import Chosen, block_of, check_blocks, find_blocks


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
        """What `to_json` made, also after it was written and read again.

        Raises:
            ValueError: If it is nothing of the kind.
        """
        try:
            attributes = {name: (before, after) for name, (before, after) in plain["attributes"].items()}
            before, after = plain["parameters"]
            plan = cls(**{**plain, "attributes": attributes, "parameters": (before, after)})
            blocks = {name: [*map(int, own)] for name, own in plan.blocks.items()}
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan: it is not as BlockPlan.to_json makes it ({type(error).__name__}: {error})") from error
        if blocks != plan.blocks:
            raise ValueError(f"plan: blocks is {str(plan.blocks)[:80]!r}, and must be lists of numbers by stack")
        return plan

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
        blocks = choose_lowest(_checked(importance, stacks), Quota(count, ratio, first, last))
    chosen = check_blocks(stacks, blocks)
    for name, numbers in chosen.items():
        free = range(first, len(stacks[name]) - last)
        if kept := [number for number in numbers if number not in free]:
            raise ValueError(f"blocks: block {kept[0]} of {name} is protected by first={first} and last={last}")
    _check_own(subject, stacks, chosen)
    before = {name: len(stack) for name, stack in stacks.items()}
    then = find_then(subject, before, chosen) if chosen else Then({}, {})
    gone = {p: p.numel() for name, own in chosen.items() for number in own for p in stacks[name][number].parameters()}
    total = sum(parameter.numel() for parameter in subject.parameters())
    sizes, scores = (total, total - sum(gone.values())), {name: own.tolist() for name, own in (importance or {}).items()}
    return BlockPlan(type(subject).__name__, _digest(subject), chosen, before, then.fields, then.attributes, sizes, scores)


def check_made_for(plan: BlockPlan, model: PreTrainedModel) -> None:
    """Refuses a plan that was made for another model, or for this one as it was.

    Raises:
        ValueError: If it was.
    """
    if (plan.model, plan.made_for) == (type(model).__name__, _digest(model)):
        return
    counts = plan.before, {name: len(stack) for name, stack in find_blocks(model).items()}
    told, has = (", ".join(f"{count} blocks in {name}" for name, count in own.items()) for own in counts)
    raise ValueError(f"plan: it was made for a {plan.model} with {told}; this {type(model).__name__} has {has}, or other tensors")


def _checked(importance: Mapping[str, Tensor] | None, stacks: Mapping[str, nn.ModuleList]) -> Mapping[str, Tensor]:
    if importance is None:
        raise ValueError("importance: count and ratio need the importance of blocks (block_importance)")
    for name, own in importance.items():
        if name not in stacks:
            raise ValueError(f"importance: there is no stack {name!r}; there are {', '.join(stacks)}")
        if len(own) != len(stacks[name]):
            raise ValueError(f"importance: {name} has {len(stacks[name])} blocks, and {len(own)} scores")
    return importance


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
