"""BlockMatching: tunes what is kept of a block, so that the block gives what the dense one gave.

As the transformer matching of 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT (Guo et al., 2024,
https://arxiv.org/abs/2402.12419) and the regional optimization of Wanda++ (Yang et al., 2025, https://arxiv.org/abs/2503.04992).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from billhook.arguments import annotated, fraction, number, whole
from billhook.engine.comm import ALONE, Comm
from billhook.engine.state import fresh_casts, overridden
from billhook.engine.trees import tree_leaves, tree_map_only
from billhook.engine.walk import Arguments, Site, spare
from billhook.linalg import float64_device
from billhook.model.linears import is_convolution, turned, weight_of
from billhook.sparsity.pruned import Pruned
from billhook.sparsity.visitor import PruningVisitor

LOOKS = 5
"""How often, in the steps of a block, what is held out is looked at."""
DECAY = 0.9, 0.99
"""Of Adam's means of gradients and of their squares; steps are few."""


@dataclass(frozen=True, eq=False)
class Passage:
    """Holds what a batch gives to a block, and what shall come out.

    Attributes:
        given: The arguments and keywords of the block, on the outputs of pruned blocks before it.
        goal: What the dense block gave, on the outputs of dense blocks before it.
        counts: Which tokens count, bool, of the shape of the goal without its last dimension; None if all do.
    """

    given: Arguments
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
        >>> plan = bh.prune(model, bh.Wanda(), batches, sparsity=0.5, match=bh.criteria.BlockMatching())
    """

    steps: int | None = None
    lr: float = 0.02
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        annotated(BlockMatching, vars(self))
        whole("steps", 1 if self.steps is None else self.steps)
        number("lr", self.lr, above=0)
        fraction("held_out", self.held_out, "(0, 1)", "the batches")
        whole("seed", self.seed, 0)

    def is_held_out(self, count: int) -> list[bool]:
        """Picks some of so many batches, two at least, that lie evenly among them: True for each that is held out."""
        some = min(max(1, round(self.held_out * count)), count - 1)
        held = {int((place + 0.5) * count / some) for place in range(some)}
        return [number in held for number in range(count)]


class Tuning:
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
        comm: Comm = ALONE,
    ) -> None:
        self.matching, self.block, self.keeps, self.comm = matching, block, keeps, comm
        self.tuned = {name: _wide(weight).detach().clone().requires_grad_() for name, weight in weights.items()}
        others = {name: one.detach() for name, one in (*block.named_parameters(), *block.named_buffers())}
        self.others = {name: _wide(one) for name, one in others.items() if name not in weights}

    def __call__(self, tune: Sequence[Passage], held_out: Sequence[Passage]) -> dict[str, Tensor]:
        """Tunes on some passages, and returns the weights, float32, that were best on others."""
        optimizer, steps = self._optimizer(), self._steps(len(tune))
        order = torch.Generator().manual_seed(self.matching.seed)
        queue, looks = list[int](), {steps * look // LOOKS for look in range(1, LOOKS + 1)}
        inner = getattr(self.block, "_orig_mod", self.block)  # of what torch.compile has wrapped
        with overridden(self.block, forward=partial(type(inner).forward, inner)):
            best, state = self._measured(held_out), self._state()
            for step in range(1, steps + 1):
                queue = queue or torch.randperm(len(tune), generator=order).tolist()
                self._step(optimizer, tune[queue.pop()], _share(step, steps))
                if step in looks and (now := self._measured(held_out)) < best:
                    best, state = now, self._state()
        return state

    def _steps(self, batches: int) -> int:
        """Returns the number of steps: by default one for each batch, of ranks together as many as each has on average."""
        if self.matching.steps is not None:
            return self.matching.steps
        device = next(iter(self.tuned.values())).device
        count = torch.tensor([float(batches), 1.0], device=device)
        every, ranks = self.comm(count)
        return math.ceil(float(every / ranks))

    def _optimizer(self) -> torch.optim.Adam:
        groups = [
            {"params": [weight], "lr": 0.0, "most": self.matching.lr * _size(weight.detach(), self.keeps[name])}
            for name, weight in self.tuned.items()
        ]
        return torch.optim.Adam(groups, betas=DECAY)

    def _step(self, optimizer: torch.optim.Adam, passage: Passage, share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = share * group["most"]
        with torch.enable_grad():
            error, count = self._error(passage)
            found = torch.autograd.grad(error / count, list(self.tuned.values()), allow_unused=True)
        for (name, weight), gradient in zip(self.tuned.items(), found, strict=True):
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient * self.keeps[name]
        self.comm.sum_(*(weight.grad for weight in self.tuned.values() if weight.grad is not None))
        optimizer.step()

    @torch.no_grad()
    def _measured(self, passages: Sequence[Passage]) -> float:
        """Returns the mean error of the tokens of passages, on all ranks."""
        device = float64_device(next(iter(self.tuned.values())).device)
        sums = torch.stack([torch.stack(self._error(passage)).to(device).double() for passage in passages]).sum(0)
        error, count = self.comm(sums)
        return float(error / count)

    def _error(self, passage: Passage) -> tuple[Tensor, Tensor]:
        """Returns the sum of the errors of tokens, and how many these are."""
        device = next(iter(self.tuned.values())).device
        there = passage.given, passage.goal, passage.counts
        (args, kwargs), goal, counts = tree_map_only(Tensor, lambda one: _wide(one.to(device)), there)
        args, kwargs = tuple(map(spare, args)), {name: spare(value) for name, value in kwargs.items()}
        with fresh_casts():  # Adam changes in place what the block may have cast, if its forward enters autocast
            given = stream_in(functional_call(self.block, self.tuned | self.others, args, kwargs))
        assert given is not None, "it has come out before"
        size = goal.square().sum(-1)
        errors = (given - goal).square().sum(-1) / torch.where(size > 0, size, 1)
        errors = errors if counts is None else errors[counts]
        return errors.sum(), torch.tensor(float(errors.numel()), device=errors.device).clamp(min=1)

    def _state(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.tuned.items()}


def stream_in(output: object) -> Tensor | None:
    """Returns what a block hands to the next: the first tensor of floating-point numbers that it gives."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _share(step: int, steps: int) -> float:
    """Returns the share of the largest step size that a step takes: it rises in the first half of the steps, and falls then."""
    return 1 - abs((2 * step - 1) / steps - 1)


def _size(weight: Tensor, keep: Tensor) -> float:
    """Returns the root mean square of kept weights."""
    return math.sqrt(float(weight.square().sum() / keep.sum().clamp(min=1)))


def _wide(tensor: Tensor) -> Tensor:
    """Returns floating-point numbers in float32, outside of inference mode, in which nothing has gradients."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.float() if tensor.is_floating_point() else tensor


class MatchingVisitor(PruningVisitor):
    """A visitor of runs in two series of the same batches, the second of the dense model, which says what blocks shall give.

    Args:
        matching: How blocks are tuned.
    """

    def __init__(self, matching: BlockMatching, *args: Any, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args, **walk)
        self.matching = matching
        self.dense = range(len(self.tokens), 2 * len(self.tokens))
        self._given: dict[int, tuple[Arguments, Tensor]] = {}

    def came_out(self, run: int, given: Arguments, output: object) -> None:
        """Notes what a block was given, and what it gave."""
        if (stream := stream_in(output)) is not None:
            self._given[run] = given, stream

    def came_again(self, site: Site) -> None:
        """Refuses linears that are called again when their block has been matched."""
        if site.linears:
            refuse_called_again(site.linears)
        super().came_again(site)

    def complete(self, site: Site) -> None:
        """Prunes the linears of a site, or tunes those of a block that all runs have come out of."""
        if not site.out:
            super().complete(site)
            return
        own = {name: self.pruned[name] for name in site.linears if name in self.pruned}
        passages, self._given = self._passages(), {}
        if own and self._enough(passages, site.linears[next(iter(own))].get_parameter("weight").device):
            self.pruned |= self._tune(site, own, passages)

    def _enough(self, passages: Sequence[Passage], device: torch.device) -> bool:
        """Tells whether all ranks have passages to tune on, and others to hold out."""
        lacking = torch.tensor([float(len(passages) < 2)], device=device)
        return not self.comm(lacking)

    def _passages(self) -> list[Passage]:
        found = []
        for run, dense in enumerate(self.dense):
            if run in self._given and dense in self._given:
                (given, output), (_, goal) = self._given[run], self._given[dense]
                if output.shape == goal.shape:
                    found.append(Passage(given, goal, self._counting(goal.shape[:-1], goal, run)))
        return found

    def _tune(self, site: Site, own: dict[str, Pruned], passages: Sequence[Passage]) -> dict[str, Pruned]:
        names = {id(one): name for name, one in site.module.named_parameters()}
        lies, weights, keeps = dict[str, str](), dict[str, Tensor](), dict[str, Tensor]()
        for name, one in own.items():
            linear = site.linears[name]
            lies[name] = key = names[id(linear.get_parameter("weight"))]
            weights[key] = turned(linear, one.weight(weight_of(linear)))
            keeps[key] = turned(linear, one.keep(weight_of(linear)))
        held_out = self.matching.is_held_out(len(passages))
        parts = [[one for one, held in zip(passages, held_out, strict=True) if held is part] for part in (False, True)]
        with torch.inference_mode(False):
            tuning = Tuning(self.matching, site.module, weights, keeps, self.comm)
            weights.clear()  # it has copies
            tuned = tuning(*parts)
        return {name: self._rounded(site.linears[name], one, tuned[lies[name]]) for name, one in own.items()}

    @staticmethod
    def _rounded(linear: nn.Module, one: Pruned, tuned: Tensor) -> Pruned:
        """Returns a linear's part of the plan with tuned weights, as they lie in memory, rounded to the dtype of the old ones."""
        old = weight_of(linear)
        new = tuned.movedim(1, -1).flatten(1) if is_convolution(linear) else turned(linear, tuned)
        return Pruned.of(old, new.to(old.dtype), one.keep(old))


def refuse_called_again(linears: Iterable[str]) -> NoReturn:
    """Refuses linears that would be pruned before they are called again, or under another name."""
    again = next(iter(linears))
    raise ValueError(f"match: {again} is called again after its block, or shares its weight: leave match out, or skip it")
