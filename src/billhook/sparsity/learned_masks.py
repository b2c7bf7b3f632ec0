"""Learned masks: recomputed after each optimizer step, while all weights train (SR-STE)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from billhook.calibration.calibration import Batches
from billhook.engine.comm import Comm
from billhook.engine.state import replaced
from billhook.engine.statistics import Statistics
from billhook.model.layers import find_tied, prunable, to_layout, weight_of
from billhook.sparsity.allocation import Uniform, allocate_sparsities
from billhook.sparsity.checks import (
    check_called,
    check_pruning,
    make_runs,
    needs_data,
    unsupported_weights,
    warn_of_unsupported_weights,
)
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.grouped import GroupedStatistics, empty_statistics, prefix_errors, prune_weight, score_weight
from billhook.sparsity.masks import check_amount, parse_pattern, where_kept
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.visitor import PruningVisitor, Walks


@dataclass(frozen=True)
class MaskRule:
    """Everything that determines the mask of a linear layer, besides its weight.

    Attributes:
        sparsity: Fraction of the weights that are masked.
        statistics: Statistics of its inputs; None if the criterion needs no data.
    """

    sparsity: float
    statistics: Statistics | GroupedStatistics | None

    def keep(self, name: str, linear: nn.Module, criterion: Criterion, pattern: str) -> Tensor:
        """Returns the mask of a linear layer for its current weight, bool, in memory layout."""
        with prefix_errors(name):
            _, keep = prune_weight(criterion, weight_of(linear), self.statistics, self.sparsity, pattern)
        if self.statistics is not None:
            self.statistics.freeze()
        return to_layout(linear, keep).contiguous()

    def again(self, name: str, linear: nn.Module, criterion: Criterion, pattern: str) -> Tensor:
        """Returns the same mask as `keep`, without its checks and without a host sync.

        For use after each step. NaN weights are kept, so that the loss shows them.
        """
        overridden = [getattr(type(criterion), name) is not getattr(Criterion, name) for name in ("prune", "solve", "keep")]
        if any(overridden):  # a custom criterion may check its inputs
            return self.keep(name, linear, criterion, pattern)
        scores = score_weight(criterion, weight_of(linear), self.statistics)
        return to_layout(linear, criterion.keep(scores, self.sparsity, parse_pattern(pattern), check=False)).contiguous()

    def state(self) -> dict[str, Any]:
        """Returns the rule for a checkpoint."""
        return {"sparsity": self.sparsity, "sums": [] if self.statistics is None else self.statistics.tensors()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], linear: nn.Module, criterion: Criterion) -> "MaskRule":
        """Restores a rule from a checkpoint."""
        if not state["sums"]:
            return cls(state["sparsity"], None)
        statistics = empty_statistics(criterion, linear, weight_of(linear).device)
        for sums, saved in zip(statistics.tensors(), state["sums"], strict=True):
            sums.copy_(saved)
        return cls(state["sparsity"], statistics)


class _NotingVisitor(PruningVisitor):
    """A visitor that records the mask rule of each layer that it prunes."""

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - the arguments of `PruningVisitor`
        super().__init__(*args)
        self.noted: dict[str, MaskRule] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Prunes the layers and records their mask rules."""
        super().finish(linears)
        self.noted |= {name: MaskRule(self.sparsities[name], self.statistics_of(name)) for name in linears}


def find_mask_rules(
    model: nn.Module,
    criterion: Criterion,
    batches: Batches | None,
    sparsity: float,
    pattern: str,
    options: PruneOptions,
    comm: Comm,
) -> dict[str, MaskRule]:
    """Returns the mask rules of the masks that `prune` would make, without changing the model."""
    linears = check_pruning(model, criterion, pattern, options)
    walks = Walks(model, linears, make_runs(model, batches, comm, criterion, options.allocation), comm, None, None, {})
    warn_of_unsupported_weights(unsupported_weights(model, linears))
    sparsities = allocate_sparsities(walks, check_amount(sparsity, pattern), options.allocation or Uniform())
    make = partial(_NotingVisitor, criterion, sparsities, pattern, None)
    noted = walks(options.sequential if needs_data(criterion) else None, make).noted
    check_called(linears, noted)
    return {name: noted[name] for name in linears if name in noted}


class LearnedMasks:
    """Masks that follow the weights after each optimizer step, and hooks that apply them.

    `masks` maps linear layers to masks, bool, in the memory layout of the weights. The parameters keep all their values.
    """

    def __init__(self, criterion: Criterion, pattern: str) -> None:
        self.criterion, self.pattern = criterion, pattern
        self._hooks: list[RemovableHandle] = []
        self.clear()

    def clear(self) -> None:
        """Drops masks and rules."""
        self.detach()
        self.masks: dict[str, Tensor] = {}
        self.chosen: dict[str, MaskRule] = {}
        self._saved: Mapping[str, Any] = {}

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Uses a model and its optimizers, and continues with the masks of a checkpoint."""
        self._model, self._optimizers = model, optimizers
        if self._saved:
            linears = prunable(model, output_embeddings=True, convolutions="all")
            self.chosen = {name: MaskRule.from_state(state, linears[name], self.criterion) for name, state in self._saved.items()}
            self._saved = {}
        if self.chosen:
            self.begin(self.chosen)

    def begin(self, chosen: Mapping[str, MaskRule]) -> None:
        """Applies masks in the forward pass of the linear layers from now on."""
        every = prunable(self._model, output_embeddings=True, convolutions="all")
        linears, masks = dict[str, nn.Module](), dict[str, Tensor]()
        for name, rule in chosen.items():
            linears[name] = every[name]
            masks[name] = rule.keep(name, every[name], self.criterion, self.pattern)
        self.detach()
        self.chosen, self.masks, self._linears = dict(chosen), masks, linears
        self._names = {linear: name for name, linear in (*linears.items(), *find_tied(self._model, linears))}
        self._unmasked = dict[nn.Module, nn.Parameter]()  # original parameters, while a masked layer runs
        self._hooks = [optimizer.register_step_post_hook(self._stepped) for optimizer in self._optimizers]
        for linear in self._names:  # after other hooks, which may gather weights; restored even if the forward pass fails
            self._hooks += [
                linear.register_forward_pre_hook(self._mask, prepend=False),
                linear.register_forward_hook(self._restore, always_call=True),
            ]
        torch.compiler.reset()  # compiled code ignores new hooks

    def detach(self) -> None:
        """Removes all hooks; the masks stay."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            torch.compiler.reset()
        self._hooks = []

    def decay(self, optimizer: Optimizer, decay: float) -> None:
        """Adds decay (1 - m) * W to the gradients before an optimizer step."""
        for name in self._of(optimizer) if self._hooks else ():
            weight = self._linears[name].get_parameter("weight")
            if weight.grad is not None:
                weight.grad.add_(where_kept(weight.detach(), ~self.masks[name]), alpha=decay)

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """Sets masked weights to zero within the context."""
        kept = {name: where_kept(self._linears[name].get_parameter("weight").detach(), keep) for name, keep in self.masks.items()}
        with replaced({self._linears[name]: {"weight": weight} for name, weight in kept.items()}):
            yield

    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        """Updates the masks of the weights that an optimizer trains."""
        with torch.no_grad():
            for name in self._of(optimizer):
                self.masks[name] = self.chosen[name].again(name, self._linears[name], self.criterion, self.pattern)

    def _of(self, optimizer: Optimizer) -> list[str]:
        """Returns the linear layers whose weights an optimizer trains."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [name for name, linear in self._linears.items() if id(linear.get_parameter("weight")) in trained]

    def _mask(self, linear: nn.Module, _: object) -> None:
        # private: the attribute accepts only a Parameter, which cannot be part of a graph
        weight = linear.get_parameter("weight")
        self._unmasked[linear] = weight
        linear._parameters["weight"] = _Straight.apply(weight, self.masks[self._names[linear]])  # type: ignore[no-untyped-call]

    def _restore(self, linear: nn.Module, *_: object) -> None:
        if linear in self._unmasked:
            linear._parameters["weight"] = self._unmasked.pop(linear)

    def state_dict(self) -> dict[str, Any]:
        """Returns the mask rules for a checkpoint."""
        return {name: choice.state() for name, choice in self.chosen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores saved mask rules when a model is attached."""
        self.clear()
        self._saved = state


@contextmanager
def with_learned_masks(model: nn.Module) -> Iterator[None]:
    """Sets the weights of a model to their masked values within the context."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), LearnedMasks)]
    with ExitStack() as stack:
        for owner in dict.fromkeys(owners):
            stack.enter_context(owner.zeroed())
        yield


class _Straight(torch.autograd.Function):
    """Straight-through masking: m * W forward, the full gradient backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, keep: Tensor) -> Tensor:
        """Returns the masked weight."""
        return where_kept(weight, keep)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient on unchanged."""
        return gradients[0], None
