"""Block-wise reconstruction: tunes a pruned block to reproduce the dense block's output.

As the transformer matching of 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT (Guo et al., 2024,
https://arxiv.org/abs/2402.12419), and the regional optimization of Wanda++ (Yang et al., 2025,
https://arxiv.org/abs/2503.04992).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from billhook.arguments import check_fraction, check_int, check_number, check_types
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.state import fresh_autocast_cache, overridden
from billhook.engine.trees import tree_leaves, tree_map_only
from billhook.engine.walk import Arguments, Site, copy_cache
from billhook.linalg import float64_device
from billhook.model.layers import is_convolution, to_layout, weight_of
from billhook.sparsity.visitor import PruningVisitor
from billhook.sparsity.weight_plan import PrunedLayer

EVALUATIONS = 5
"""Evaluations on held-out batches during the steps of a block."""
ADAM_BETAS = 0.9, 0.99
"""Adam's betas, low because steps are few."""


@dataclass(frozen=True, eq=False)
class BlockSample:
    """A block's input for a batch, and its target output.

    Attributes:
        inputs: Arguments and keywords of the block, computed by pruned blocks before it.
        goal: Output of the dense block, computed by dense blocks before it.
        counts: Mask of non-padding tokens, bool, in the shape of the goal without its last dimension; None if all count.
    """

    inputs: Arguments
    goal: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class BlockMatching:
    """Tunes the kept weights of each block with Adam to reproduce the dense block's output.

    A criterion prunes one linear layer at a time. Block-wise reconstruction then compensates for the errors of all layers of the
    block, and of all blocks before it. The error of a token is the squared difference, divided by the squared output of the
    dense block. Some batches are held out, and each block keeps the state with the lowest held-out error, so that error never
    increases. As in 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT
    (https://arxiv.org/abs/2402.12419), and Wanda++ (https://arxiv.org/abs/2503.04992).

    A step runs a block forward and backward on a batch. Tuned weights are float32, and rounded once at the end.

    Args:
        steps: Adam steps for each block. Defaults to the number of batches that are not held out.
        lr: Maximum step size, as a share of the root mean square of a layer's kept weights. It rises during the first half of
            the steps, then falls to zero.
        held_out: Fraction of the batches to hold out, in (0, 1); at least one batch.
        seed: Seed for the order of batches.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import billhook as bh
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(i, i + 32)[None]} for i in range(4)]
        >>> plan = bh.prune(model, bh.Wanda(), batches, sparsity=0.5, options=bh.PruneOptions(match=bh.criteria.BlockMatching()))
    """

    steps: int | None = None
    lr: float = 0.02
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(BlockMatching, vars(self))
        check_int("steps", 1 if self.steps is None else self.steps)
        check_number("lr", self.lr, above=0)
        check_fraction("held_out", self.held_out, "(0, 1)", "the batches")
        check_int("seed", self.seed, 0)

    def is_held_out(self, count: int) -> list[bool]:
        """Returns, for `count` batches, True for each that is held out, evenly spaced."""
        num_held_out = min(max(1, round(self.held_out * count)), count - 1)
        held_out = {int((number + 0.5) * count / num_held_out) for number in range(num_held_out)}
        return [batch in held_out for batch in range(count)]


class BlockTuning:
    """Tunes the kept weights of a block.

    Args:
        matching: Settings.
        block: The block, whose parameters do not change.
        weights: Weights to tune, by parameter name in the block, in memory layout.
        keeps: Masks of these weights, bool.
        comm: The ranks, each with its own samples.
    """

    def __init__(
        self,
        matching: BlockMatching,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        keeps: Mapping[str, Tensor],
        comm: Comm = SINGLE_PROCESS,
    ) -> None:
        self.matching, self.block, self.keeps, self.comm = matching, block, keeps, comm
        self.tuned = {name: _as_float32(weight).detach().clone().requires_grad_() for name, weight in weights.items()}
        fixed = chain(block.named_parameters(), block.named_buffers())
        self.fixed = {name: _as_float32(tensor.detach()) for name, tensor in fixed if name not in weights}
        self.device = next(iter(self.tuned.values())).device

    def __call__(self, tune: Sequence[BlockSample], held_out: Sequence[BlockSample]) -> dict[str, Tensor]:
        """Tunes on samples, and returns the float32 weights with the lowest held-out error."""
        steps = self.matching.steps
        if steps is None:  # a step for each batch; with several ranks the average number of batches
            batches, ranks = self.comm(torch.tensor([float(len(tune)), 1.0], device=self.device))
            steps = math.ceil(float(batches / ranks))
        groups = []
        for name, weight in self.tuned.items():
            mean_square = weight.detach().square().sum() / self.keeps[name].sum().clamp(min=1)
            groups.append({"params": [weight], "lr": 0.0, "most": self.matching.lr * math.sqrt(float(mean_square))})
        optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS)
        order, queue = torch.Generator().manual_seed(self.matching.seed), list[int]()
        evaluated_steps = {steps * evaluation // EVALUATIONS for evaluation in range(1, EVALUATIONS + 1)}
        inner = getattr(self.block, "_orig_mod", self.block)  # the module inside torch.compile's wrapper
        with overridden(self.block, forward=partial(type(inner).forward, inner)):
            best, state = self._measured(held_out), self._state()
            for step in range(1, steps + 1):
                queue = queue or torch.randperm(len(tune), generator=order).tolist()
                share = 1 - abs((2 * step - 1) / steps - 1)  # of the maximum step size: linear warmup and decay
                for group in optimizer.param_groups:
                    group["lr"] = share * group["most"]
                self._step(optimizer, tune[queue.pop()])
                if step in evaluated_steps and (error := self._measured(held_out)) < best:
                    best, state = error, self._state()
        return state

    def _step(self, optimizer: torch.optim.Adam, sample: BlockSample) -> None:
        with torch.enable_grad():
            error, count = self._error(sample)
            gradients = torch.autograd.grad(error / count, list(self.tuned.values()), allow_unused=True)
        for (name, weight), gradient in zip(self.tuned.items(), gradients, strict=True):
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient * self.keeps[name]
        self.comm.sum_(*(weight.grad for weight in self.tuned.values() if weight.grad is not None))
        optimizer.step()

    @torch.no_grad()
    def _measured(self, samples: Sequence[BlockSample]) -> float:
        """Returns the mean error of the tokens of samples, on all ranks."""
        device = float64_device(self.device)
        sums = torch.stack([torch.stack(self._error(sample)).to(device).double() for sample in samples]).sum(0)
        error, count = self.comm(sums)
        return float(error / count)

    def _error(self, sample: BlockSample) -> tuple[Tensor, Tensor]:
        """Returns the summed error of tokens, and their number."""
        inputs = sample.inputs, sample.goal, sample.counts
        (args, kwargs), goal, counts = tree_map_only(Tensor, lambda tensor: _as_float32(tensor.to(self.device)), inputs)
        args, kwargs = tuple(map(copy_cache, args)), {name: copy_cache(value) for name, value in kwargs.items()}
        with fresh_autocast_cache():  # Adam changes weights in place, so autocast's cached casts are stale
            output = hidden_state(functional_call(self.block, self.tuned | self.fixed, args, kwargs))
        assert output is not None, "it has come out before"
        size = goal.square().sum(-1)
        errors = (output - goal).square().sum(-1) / torch.where(size > 0, size, 1)
        errors = errors if counts is None else errors[counts]
        return errors.sum(), torch.tensor(float(errors.numel()), device=errors.device).clamp(min=1)

    def _state(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.tuned.items()}


def hidden_state(output: object) -> Tensor | None:
    """Returns the hidden states that a block returns: its first floating-point tensor."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _as_float32(tensor: Tensor) -> Tensor:
    """Returns floating-point tensors in float32, as normal tensors that can have gradients."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.float() if tensor.is_floating_point() else tensor


class MatchingVisitor(PruningVisitor):
    """A visitor that runs each batch twice, pruned and dense, and reconstructs blocks.

    Args:
        matching: Settings of block-wise reconstruction.
        args: Arguments of `PruningVisitor`.
    """

    def __init__(self, matching: BlockMatching, *args: Any) -> None:  # noqa: ANN401 - the arguments of `PruningVisitor`
        super().__init__(*args)
        self.matching, self._batches = matching, len(self.walks.runs)
        self.dense = range(self._batches, 2 * self._batches)
        self._outputs: dict[int, tuple[Arguments, Tensor]] = {}  # by run

    def check_runs(self) -> None:
        """Raises if linear layers share a weight, which would be pruned before its second use."""
        if self.walks.tied:
            raise_block_called_again(self.walks.tied[0][0])

    def on_exit(self, run: int, given: Arguments, output: object) -> None:
        """Records the input and output of a block."""
        if (state := hidden_state(output)) is not None:
            self._outputs[run] = given, state

    def on_reentry(self, site: Site) -> None:
        """Raises if linear layers are called again after their block was tuned."""
        if site.linears:
            raise_block_called_again(next(iter(site.linears)))
        super().on_reentry(site)

    def complete(self, site: Site) -> None:
        """Prunes the linear layers of a stop, or tunes the block that all runs have left."""
        if not site.out:
            super().complete(site)
            return
        linears = {name: linear for name, linear in site.linears.items() if name in self.pruned}
        samples, outputs = list[BlockSample](), self._outputs
        self._outputs = {}
        for run in range(self._batches):
            if run in outputs and (dense := run + self._batches) in outputs:
                (inputs, output), (_, goal) = outputs[run], outputs[dense]
                if output.shape == goal.shape:
                    samples.append(BlockSample(inputs, goal, self._counting(goal.shape[:-1], goal, run)))
        if linears:
            # each rank needs samples to tune on and samples to hold out
            too_few = torch.tensor([float(len(samples) < 2)], device=weight_of(next(iter(linears.values()))).device)
            if not self.comm(too_few):
                self._tune(site.module, linears, samples)

    def _tune(self, block: nn.Module, linears: Mapping[str, nn.Module], samples: Sequence[BlockSample]) -> None:
        names = {id(parameter): name for name, parameter in block.named_parameters()}
        parameters = {name: names[id(linear.get_parameter("weight"))] for name, linear in linears.items()}
        weights, keeps = dict[str, Tensor](), dict[str, Tensor]()
        for name, linear in linears.items():
            weights[parameters[name]] = to_layout(linear, self.pruned[name].weight(weight_of(linear)))
            keeps[parameters[name]] = to_layout(linear, self.pruned[name].keep(weight_of(linear)))
        parts: tuple[list[BlockSample], list[BlockSample]] = ([], [])
        for sample, is_held_out in zip(samples, self.matching.is_held_out(len(samples)), strict=True):
            parts[is_held_out].append(sample)
        with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
            tuning = BlockTuning(self.matching, block, weights, keeps, self.comm)
            weights.clear()  # copied by BlockTuning
            tuned = tuning(*parts)
        for name, linear in linears.items():  # rounded to the dtype of the old weights
            old, new = weight_of(linear), tuned[parameters[name]]
            new = new.movedim(1, -1).flatten(1) if is_convolution(linear) else to_layout(linear, new)
            self.pruned[name] = PrunedLayer.of(old, new.to(old.dtype), self.pruned[name].keep(old))


def raise_block_called_again(linear: str) -> NoReturn:
    """Raises for a linear layer that would be pruned before another call."""
    raise ValueError(
        f"match: {linear} is called again after its block, or shares its weight. Exclude it with skip, or do not use match."
    )
