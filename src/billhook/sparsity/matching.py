"""BlockMatching: tunes what is kept of a block, so that the block gives what the dense one gave.

As the transformer matching of 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT (Guo et al., 2024,
https://arxiv.org/abs/2402.12419) and the regional optimization of Wanda++ (Yang et al., 2025, https://arxiv.org/abs/2503.04992).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
"""How often, in the steps of a block, what is held out is looked at."""
ADAM_BETAS = 0.9, 0.99
"""Of Adam's means of gradients and of their squares; steps are few."""


@dataclass(frozen=True, eq=False)
class BlockSample:
    """Holds what a batch gives to a block, and what shall come out.

    Attributes:
        inputs: The arguments and keywords of the block, on the outputs of pruned blocks before it.
        goal: What the dense block gave, on the outputs of dense blocks before it.
        counts: Which tokens count, bool, of the shape of the goal without its last dimension; None if all do.
    """

    inputs: Arguments
    goal: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class BlockMatching:
    """Tunes the kept weights of each block, by Adam, so that the block gives what the dense model's block gave there.

    Criteria look at one linear at a time, on the outputs of what is pruned before it; here all linears of a block make up
    together for what each of them and all blocks before have lost. The error of a token is the square of what differs, over the
    square of what the dense block gave. Some batches are held out, and of each block the state is kept that is best on these:
    it is never worse there than without. As in 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT
    (https://arxiv.org/abs/2402.12419) and Wanda++ (https://arxiv.org/abs/2503.04992).

    A step takes one batch, forwards and backwards through one block; what is tuned is float32, and rounded once.

    Args:
        steps: Steps of Adam for each block; by default one for each batch that is not held out.
        lr: The largest step size, as a share of the root mean square of a linear's kept weights; it rises to that in the first
            half of the steps, and falls to zero then.
        held_out: Fraction of the batches that is held out, in (0, 1); at least one is.
        seed: Of the order of batches.

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
        """Picks some of so many batches, two at least, that lie evenly among them: True for each that is held out."""
        number_held_out = min(max(1, round(self.held_out * count)), count - 1)
        held_out = {int((number + 0.5) * count / number_held_out) for number in range(number_held_out)}
        return [batch in held_out for batch in range(count)]


class BlockTuning:
    """Tunes the kept weights of a block.

    Args:
        matching: How.
        block: The block; its parameters stay as they are.
        weights: The weights to tune, by the name of the parameter in the block, as they lie in memory.
        keeps: Of each, which weights are kept, bool.
        comm: The ranks, each of which has passages of its own.
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
        fixed = {name: tensor for name, tensor in (*block.named_parameters(), *block.named_buffers()) if name not in weights}
        self.fixed = {name: _as_float32(tensor.detach()) for name, tensor in fixed.items()}
        self.device = next(iter(self.tuned.values())).device

    def __call__(self, tune: Sequence[BlockSample], held_out: Sequence[BlockSample]) -> dict[str, Tensor]:
        """Tunes on some passages, and returns the weights, float32, that were best on others."""
        steps = self.matching.steps
        if steps is None:  # one for each batch: of ranks together as many as each has on average
            batches, ranks = self.comm(torch.tensor([float(len(tune)), 1.0], device=self.device))
            steps = math.ceil(float(batches / ranks))
        groups = []
        for name, weight in self.tuned.items():
            mean_square = weight.detach().square().sum() / self.keeps[name].sum().clamp(min=1)
            groups.append({"params": [weight], "lr": 0.0, "most": self.matching.lr * math.sqrt(float(mean_square))})
        optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS)
        order, queue = torch.Generator().manual_seed(self.matching.seed), list[int]()
        looks = {steps * look // EVALUATIONS for look in range(1, EVALUATIONS + 1)}
        inner = getattr(self.block, "_orig_mod", self.block)  # of what torch.compile has wrapped
        with overridden(self.block, forward=partial(type(inner).forward, inner)):
            best, state = self._measured(held_out), self._state()
            for step in range(1, steps + 1):
                queue = queue or torch.randperm(len(tune), generator=order).tolist()
                share = 1 - abs((2 * step - 1) / steps - 1)  # of the largest step size: up to it in the first half, then down
                for group in optimizer.param_groups:
                    group["lr"] = share * group["most"]
                self._step(optimizer, tune[queue.pop()])
                if step in looks and (now := self._measured(held_out)) < best:
                    best, state = now, self._state()
        return state

    def _step(self, optimizer: torch.optim.Adam, passage: BlockSample) -> None:
        with torch.enable_grad():
            error, count = self._error(passage)
            gradients = torch.autograd.grad(error / count, list(self.tuned.values()), allow_unused=True)
        for (name, weight), gradient in zip(self.tuned.items(), gradients, strict=True):
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient * self.keeps[name]
        self.comm.sum_(*(weight.grad for weight in self.tuned.values() if weight.grad is not None))
        optimizer.step()

    @torch.no_grad()
    def _measured(self, passages: Sequence[BlockSample]) -> float:
        """Returns the mean error of the tokens of passages, on all ranks."""
        device = float64_device(self.device)
        sums = torch.stack([torch.stack(self._error(passage)).to(device).double() for passage in passages]).sum(0)
        error, count = self.comm(sums)
        return float(error / count)

    def _error(self, passage: BlockSample) -> tuple[Tensor, Tensor]:
        """Returns the sum of the errors of tokens, and how many these are."""
        inputs = passage.inputs, passage.goal, passage.counts
        (args, kwargs), goal, counts = tree_map_only(Tensor, lambda tensor: _as_float32(tensor.to(self.device)), inputs)
        args, kwargs = tuple(map(copy_cache, args)), {name: copy_cache(value) for name, value in kwargs.items()}
        with fresh_autocast_cache():  # Adam changes in place what the block may have cast, if its forward enters autocast
            output = hidden_state(functional_call(self.block, self.tuned | self.fixed, args, kwargs))
        assert output is not None, "it has come out before"
        size = goal.square().sum(-1)
        errors = (output - goal).square().sum(-1) / torch.where(size > 0, size, 1)
        errors = errors if counts is None else errors[counts]
        return errors.sum(), torch.tensor(float(errors.numel()), device=errors.device).clamp(min=1)

    def _state(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.tuned.items()}


def hidden_state(output: object) -> Tensor | None:
    """Returns what a block hands to the next: the first tensor of floating-point numbers that it gives."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _as_float32(tensor: Tensor) -> Tensor:
    """Returns floating-point numbers in float32, outside of inference mode, in which nothing has gradients."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.float() if tensor.is_floating_point() else tensor


class MatchingVisitor(PruningVisitor):
    """A visitor of runs in two series of the same batches, the second of the dense model, which says what blocks shall give.

    Args:
        matching: How blocks are tuned.
        args: The arguments of a visitor.
    """

    def __init__(self, matching: BlockMatching, *args: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args)
        self.matching, self._batches = matching, len(self.walks.runs)
        self.dense = range(self._batches, 2 * self._batches)
        self._came_out: dict[int, tuple[Arguments, Tensor]] = {}  # by run

    def check_runs(self) -> None:
        """Refuses linears that share a weight: they would be pruned before they are called under another name."""
        if self.walks.twins:
            raise_block_called_again(self.walks.twins[0][0])

    def on_exit(self, run: int, given: Arguments, output: object) -> None:
        """Notes what a block was given, and what it gave."""
        if (state := hidden_state(output)) is not None:
            self._came_out[run] = given, state

    def on_reentry(self, site: Site) -> None:
        """Refuses linears that are called again when their block has been matched."""
        if site.linears:
            raise_block_called_again(next(iter(site.linears)))
        super().on_reentry(site)

    def complete(self, site: Site) -> None:
        """Prunes the linears of a site, or tunes those of a block that all runs have come out of."""
        if not site.out:
            super().complete(site)
            return
        linears = {name: linear for name, linear in site.linears.items() if name in self.pruned}
        passages, came_out = list[BlockSample](), self._came_out
        self._came_out = {}
        for run in range(self._batches):
            if run in came_out and (dense := run + self._batches) in came_out:
                (inputs, output), (_, goal) = came_out[run], came_out[dense]
                if output.shape == goal.shape:
                    passages.append(BlockSample(inputs, goal, self._counting(goal.shape[:-1], goal, run)))
        if linears:
            # each rank needs passages to tune on and others to hold out
            lacks = torch.tensor([float(len(passages) < 2)], device=weight_of(next(iter(linears.values()))).device)
            if not self.comm(lacks):
                self._tune(site.module, linears, passages)

    def _tune(self, block: nn.Module, linears: Mapping[str, nn.Module], passages: Sequence[BlockSample]) -> None:
        names = {id(parameter): name for name, parameter in block.named_parameters()}
        parameters = {name: names[id(linear.get_parameter("weight"))] for name, linear in linears.items()}
        weights, keeps = dict[str, Tensor](), dict[str, Tensor]()
        for name, linear in linears.items():
            weights[parameters[name]] = to_layout(linear, self.pruned[name].weight(weight_of(linear)))
            keeps[parameters[name]] = to_layout(linear, self.pruned[name].keep(weight_of(linear)))
        parts: tuple[list[BlockSample], list[BlockSample]] = ([], [])
        for passage, is_held_out in zip(passages, self.matching.is_held_out(len(passages)), strict=True):
            parts[is_held_out].append(passage)
        with torch.inference_mode(False):  # runs may be in it, and nothing that is made there has gradients
            tuning = BlockTuning(self.matching, block, weights, keeps, self.comm)
            weights.clear()  # it has copies
            tuned = tuning(*parts)
        for name, linear in linears.items():  # rounded to the dtype of the old weights
            old, new = weight_of(linear), tuned[parameters[name]]
            new = new.movedim(1, -1).flatten(1) if is_convolution(linear) else to_layout(linear, new)
            self.pruned[name] = PrunedLayer.of(old, new.to(old.dtype), self.pruned[name].keep(old))


def raise_block_called_again(linear: str) -> NoReturn:
    """Refuses a linear that would be pruned before it is called again, or under another name."""
    raise ValueError(f"match: {linear} is called again after its block, or shares its weight: leave match out, or skip it")
