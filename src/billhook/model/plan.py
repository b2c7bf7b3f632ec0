"""The protocol of all plans: units, blocks, weights and KV heads alike."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.optim import Optimizer

Weights = Mapping[str, Tensor]
"""New values of parameters, by the parameter's name."""


class Plan(ABC):
    """A change of a model, found and checked before it is made; `print` shows a table.

    A plan is plain data: it can be shown, saved as JSON and applied later, to the model that it was made for.

    Attributes:
        kind: What the plan changes; JSON names it.
        model: The name of the model's class.
    """

    kind: ClassVar[str]
    model: str

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data, from which `Plan.from_json` makes it again; `"kind"` says which plan it is."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        """Makes a plan of any kind from what its `to_json` returned.

        Args:
            plain: What `to_json` returned, also after it was written and read again.
            model: The model that the plan was made for, as it was then.

        Raises:
            ValueError: If it is nothing of the kind, or was made for a model of another class or shape.
        """
        kinds = {plan.kind: plan for plan in _subclasses(cls) if "kind" in vars(plan)}
        kind = plain.get("kind") if isinstance(plain, Mapping) else None
        if kind not in kinds:
            raise ValueError(f"plan: its kind is {kind!r}, and must be one of {', '.join(sorted(kinds))}, as to_json says it")
        made: Self = kinds[kind]._read(plain, model)
        return made

    @classmethod
    @abstractmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        """Makes a plan of this kind of plain data."""

    @abstractmethod
    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that the plan was not made for.

        Raises:
            ValueError: If the model's class, shape or units are others.
        """

    @abstractmethod
    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Carries the plan out, in place; see `apply`."""


def _subclasses(kind: type[Plan]) -> list[type[Any]]:
    return [kind, *(one for own in kind.__subclasses__() for one in _subclasses(own))]


def apply(model: nn.Module, plan: Plan, optimizers: Optimizer | Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Where heads and feed-forward channels are removed, the result is first compared with the model in which they are masked.

    Args:
        model: The model that the plan was made for, as it is now.
        plan: What `plan`, `plan_units`, `prune(dry_run=True)` or `Plan.from_json` returned.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        weights: New values of parameters, in their sizes before, from which the plan starts, as `repair` returns them.

    Raises:
        ValueError: If the plan was not made for this model, or the model's code does not follow.
    """
    plan.check_made_for(model)
    plan.apply(model, [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers), weights)
