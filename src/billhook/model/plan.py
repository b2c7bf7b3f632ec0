"""Plans of what is done to a model: to its units, blocks, weights or KV heads."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from billhook.arguments import check_types
from billhook.display import Printable
from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.model.find import check_changeable
from billhook.model.surgery import UpdateOptimizers, check_replaceable, values_restored_on_error

Weights = Mapping[str, Tensor]
"""New values of parameters, by the parameter's name."""


class ModelPlan(Printable):
    """A change of a model, found and checked before anything changes; `print` shows a table.

    A plan is plain data: it can be shown, saved as JSON and applied later, to the model that it was made for.

    Attributes:
        kind: The plan's kind in JSON.
        model: The name of the model's class.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> plain = bh.pruning.plan_units(model, {0: [0, 1]}).to_json()
        >>> plain["kind"], bh.ModelPlan.from_json(plain, model).to_json() == plain
        ('units', True)
    """

    kind: ClassVar[str]
    model: str

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data, from which `ModelPlan.from_json` makes it again."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        """Makes a plan of any kind from its plain data.

        Args:
            plain: The result of `to_json`, also after it was written and read again.
            model: The model that the plan was made for, as it was then.

        Raises:
            ValueError: If it is no such data, or was made for a model of another class or shape.
        """
        kinds = {plan.kind: plan for plan in subclasses(cls) if "kind" in vars(plan)}
        kind = plain.get("kind") if isinstance(plain, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"plan: its kind is {kind!r}, and must be one of {', '.join(sorted(kinds))}, as to_json returns it")
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


class ShapePlan(ModelPlan):
    """A plan that replaces parameters by smaller ones, or leaves some out."""

    @abstractmethod
    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Carries the plan out on a model, in place or not at all, and returns what has optimizers follow."""

    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Carries the plan out, in place; see `apply`."""
        trained_by = list(optimizers)
        check_replaceable(model, trained_by)
        self.change(model, weights)(trained_by)


def subclasses(kind: type[Any]) -> list[type[Any]]:
    """Returns a class and all that are derived from it."""
    return [kind, *(derived for child in kind.__subclasses__() for derived in subclasses(child))]


def check_weights(model: nn.Module, weights: Weights | None) -> None:
    """Refuses new values of what is no parameter of a model, or of other sizes; those in files are read later, one at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in weights or ():
        if name not in parameters:
            raise ValueError(f"weights: {name!r} is no parameter of {type(model).__name__}")
    for name, value in weights.items() if isinstance(weights, dict) else ():
        if value.shape != parameters[name].shape:
            raise ValueError(f"weights: {name} is {list(value.shape)}, and must be {list(parameters[name].shape)}")


@contextmanager
def with_weights(model: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Gives parameters new values, in place; the old ones come back if an error is raised within.

    Those of blocks that come and go they have whenever these come, within; one that changes keeps them.
    """
    check_weights(model, weights)
    store, new = store_of(model), weights or {}
    inside = {name for name in new if store.block_of(name) is not None}
    pairs = [(model.get_parameter(name), new[name]) for name in new if name not in inside]
    with values_restored_on_error(parameter for parameter, _ in pairs):
        for parameter, value in pairs:
            parameter.data.copy_(value)
        with store.altered(partial(_take, model, new)) if inside else nullcontext():
            yield


@torch.no_grad()
def _take(model: nn.Module, weights: Weights, block: nn.Module) -> list[nn.Parameter]:
    """Puts new values into parameters of a block, and returns these."""
    inside = {id(parameter) for parameter in block.parameters()}
    taken = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside and name in weights}
    for name, parameter in taken.items():
        parameter.copy_(weights[name])
    return list(taken.values())


def apply(
    model: nn.Module, plan: ModelPlan, optimizers: Optimizer | Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Where heads and feed-forward channels are removed, the result is first compared with the model in which they are masked.

    Args:
        model: The model that the plan was made for, as it is now.
        plan: A plan of any kind, from `plan`, `plan_units`, `prune(dry_run=True)` or `ModelPlan.from_json`.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        weights: New values of parameters, in their sizes before, from which the plan starts, as `repair` returns them.

    Raises:
        ValueError: If the plan was not made for this model, or the model's code does not follow.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
        >>> bh.apply(model, plan)
        >>> model.num_parameters() == plan.parameters[1]
        True
    """
    check_types(apply, locals())
    plan.check_made_for(model)
    apply_plan(model, plan, [optimizers] if isinstance(optimizers, Optimizer) else optimizers, weights)


def apply_plan(model: nn.Module, plan: ModelPlan, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
    """Carries out a plan as `apply` does, one that has just been made of the model as it is."""
    check_changeable(model)
    with torch.inference_mode(mode=False):  # whose tensors nothing could change later
        plan.apply(model, optimizers, without_inference_tensors(weights))


def without_inference_tensors(weights: Weights | None) -> Weights | None:
    """Returns new values without such as were made in inference mode, which nothing could change later: copies instead."""
    if isinstance(weights, LazyTensors):
        return weights.map(lambda _, read: _usable(read()))
    return {name: _usable(value) for name, value in weights.items()} if isinstance(weights, dict) else weights


def _usable(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value
