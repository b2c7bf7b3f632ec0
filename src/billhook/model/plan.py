"""Plans for changing units, blocks, weights, or KV heads of a model."""

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
from billhook.engine import LazyTensors, cpu_by_default, store_of
from billhook.model.find import check_changeable
from billhook.model.surgery import UpdateOptimizers, check_replaceable, values_restored_on_error

Weights = Mapping[str, Tensor]  # new values of parameters, by the parameter's name


class ModelPlan(Printable):
    """A checked change of a model that has not been applied. `print` shows a table.

    Plans are plain data. They can be saved as JSON, and applied later to the model they were made for.

    Attributes:
        kind: The kind of the plan in JSON.
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
        """Returns the plan as plain data for `ModelPlan.from_json`."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        """Creates a plan of any kind from its plain data.

        Args:
            plain: The result of `to_json`, also after saving and loading.
            model: The model that the plan was made for, in the same state.

        Raises:
            ValueError: If the data is invalid, or the model has another class or shape.
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
        """Creates a plan of this kind from plain data."""

    @abstractmethod
    def check_made_for(self, model: nn.Module) -> None:
        """Raises if the plan was made for another model.

        Raises:
            ValueError: If the class, shape, or units of the model differ.
        """

    @abstractmethod
    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Applies the plan in place. See `apply`."""


class ShapePlan(ModelPlan):
    """A plan that shrinks or removes parameters."""

    @abstractmethod
    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Applies the plan to a model, and returns a function that updates optimizers."""

    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Applies the plan in place. See `apply`."""
        trained_by = list(optimizers)
        check_replaceable(model, trained_by)
        self.change(model, weights)(trained_by)


def subclasses(kind: type[Any]) -> list[type[Any]]:
    """Returns a class and all of its subclasses."""
    return [kind, *(derived for child in kind.__subclasses__() for derived in subclasses(child))]


def check_weights(model: nn.Module, weights: Weights | None) -> None:
    """Raises for new values of unknown parameters or of other sizes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in weights or ():
        if name not in parameters:
            raise ValueError(f"weights: {name!r} is not a parameter of {type(model).__name__}.")
    for name, value in weights.items() if isinstance(weights, dict) else ():
        if value.shape != parameters[name].shape:
            raise ValueError(f"weights: {name} has size {list(value.shape)}, but must have {list(parameters[name].shape)}.")


@contextmanager
def with_weights(model: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Assigns new parameter values in place, and restores the old values after an error.

    Values in blocks that are loaded on demand are assigned on every load. A changed block keeps them.
    """
    check_weights(model, weights)
    store, new = store_of(model), weights or {}
    if new:
        store.check_writes_values()
    outside = {name: model.get_parameter(name) for name in new if store.block_of(name) is None}
    with values_restored_on_error(outside.values()):
        for name, parameter in outside.items():
            parameter.data.copy_(new[name])
        with store.altered(partial(_take, model, new)) if len(outside) < len(new) else nullcontext():
            yield


@torch.no_grad()
def _take(model: nn.Module, weights: Weights, block: nn.Module) -> list[nn.Parameter]:
    """Assigns new values to parameters of a block, and returns these parameters."""
    inside = {id(parameter) for parameter in block.parameters()}
    taken = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside and name in weights}
    for name, parameter in taken.items():
        parameter.copy_(weights[name])
    return list(taken.values())


@cpu_by_default()
def apply(
    model: nn.Module, plan: ModelPlan, optimizers: Optimizer | Iterable[Optimizer] = (), weights: Weights | None = None
) -> None:
    """Applies a plan in place. If that fails, the model and optimizers are unchanged.

    If heads or MLP channels are removed, the result is first compared with the model in which they are masked.

    Args:
        model: The model that the plan was made for, in the same state.
        plan: A plan of any kind, from `plan`, `plan_units`, `prune(dry_run=True)`, or `ModelPlan.from_json`.
        optimizers: Optimizers that train the model. Their state is remapped.
        weights: New parameter values in the old sizes, such as from `repair`, that the plan starts from.

    Raises:
        ValueError: If the plan was made for another model, or the model's code does not support the new shape.

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
    """Applies a plan like `apply`, without checking that it was made for the model."""
    check_changeable(model)
    with torch.inference_mode(mode=False):  # whose tensors nothing could change later
        plan.apply(model, optimizers, without_inference_tensors(weights))


def without_inference_tensors(weights: Weights | None) -> Weights | None:
    """Copies new values that were created in inference mode and could not be changed."""
    if isinstance(weights, LazyTensors):
        return weights.map(lambda _, read: _usable(read()))
    return {name: _usable(value) for name, value in weights.items()} if isinstance(weights, dict) else weights


def _usable(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value
