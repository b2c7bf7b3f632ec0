"""Block-wise reconstruction: tunes blocks to reproduce the dense blocks' outputs.

As the transformer matching of 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT (Guo et al., 2024,
https://arxiv.org/abs/2402.12419), the regional optimization of Wanda++ (Yang et al., 2025, https://arxiv.org/abs/2503.04992), and
the block-local distillation of Puzzle (Bercovich et al., 2024, https://arxiv.org/abs/2411.19146).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from billhook.arguments import check_fraction, check_int, check_number, check_types
from billhook.engine import (
    SINGLE_PROCESS,
    Arguments,
    Comm,
    LazyTensors,
    Run,
    Site,
    Visitor,
    Walk,
    activation_files,
    call_with_copies,
    evaluating_without_grad,
    fresh_autocast_cache,
    overridden,
    runs_fingerprint,
    separable_blocks,
    spilled_outputs,
    store_of,
    tree_leaves,
    tree_map_only,
)
from billhook.linalg import TensorDict, TensorsByName, float64_device
from billhook.model import attention_for_all_dtypes, is_adapter
from billhook.progress import OnProgress

Tie = Callable[[Tensor], Tensor]
"""Changes the gradient of a parameter, so that equal values stay equal."""
EVALUATIONS = 5
"""Evaluations on held-out batches during the steps of a block. Each runs the block on all of them."""
PRUNED_LR, REPAIRED_LR = 0.02, 0.01
LEAST_STEPS = 120
"""Steps after a repair, even if they pass the batches several times, because all weights are tuned.

On 32 windows, 28 of which are tuned on, SmolLM2 with one KV head is nearer to the dense model after 112 steps than after 28.
"""
ADAM_BETAS = 0.9, 0.99
"""Adam's betas, low because steps are few."""


@dataclass(frozen=True, eq=False)
class BlockSample:
    """A block's input for a batch, and its target output.

    Attributes:
        inputs: Arguments and keywords of the block, computed by pruned blocks before it.
        goal: Output of the dense block, computed by dense blocks before it.
        counts: Mask of non-padding tokens, bool, in the shape of the goal without its last dimension; None if all count.
        source: Source of the batch.
    """

    inputs: Arguments
    goal: Tensor
    counts: Tensor | None
    source: str = ""


@dataclass(frozen=True)
class BlockMatching:
    """Tunes the kept weights of each block with Adam to reproduce the dense block's output.

    A criterion prunes one linear layer at a time, and a repair refits one at a time. Block-wise reconstruction then compensates
    for the errors of all layers of the block, and of all blocks before it. It tunes pruned weights, or, after a repair, all
    weights and norms of the block. The error of a token is the squared difference, divided by the squared output of the dense
    block. Some batches are held out, and each block keeps the state with the lowest held-out error, so that error never
    increases. As in 3BASiL (Makni, Meng & Mazumder, 2025, https://arxiv.org/abs/2603.01376), EBFT
    (https://arxiv.org/abs/2402.12419), and Wanda++ (https://arxiv.org/abs/2503.04992).

    A step runs a block forward and backward on a batch. Tuned weights are float32, and rounded once at the end. Attention kernels
    that do not support float32, such as flash attention, are replaced by sdpa in all runs.

    Args:
        steps: Adam steps for each block. Defaults to the number of batches that are not held out; after a repair, where all
            weights are tuned, to at least 120.
        lr: Maximum step size, as a share of the root mean square of a layer's kept weights. It rises during the first half of
            the steps, then falls to zero. Defaults to 0.02 for pruned weights, and to 0.01 after a repair, where all weights are
            tuned.
        held_out: Fraction of the batches to hold out, in (0, 1); at least one, and one of each source with several.
        seed: Seed for the order of batches.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import billhook as bh
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(i, i + 32)[None]} for i in range(4)]
        >>> plan = bh.prune(model, bh.Wanda(), batches, sparsity=0.5, options=bh.PruneOptions(match=bh.criteria.BlockMatching()))
    """

    steps: int | None = None
    lr: float | None = None
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(BlockMatching, vars(self))
        check_int("steps", 1 if self.steps is None else self.steps)
        check_number("lr", PRUNED_LR if self.lr is None else self.lr, above=0)
        check_fraction("held_out", self.held_out, "(0, 1)", "the batches")
        check_int("seed", self.seed, 0)

    def num_steps(self, batches: float, least_steps: int) -> int:
        """Returns the number of steps for a block with this many training batches."""
        return self.steps or max(math.ceil(batches), least_steps)

    def is_held_out(self, sources: Sequence[str]) -> list[bool]:
        """Returns which batches are held out: evenly spaced, one or more of each source."""
        count = len(sources)
        num_held_out = min(max(1, round(self.held_out * count)), count - 1)
        held_out = {int((number + 0.5) * count / num_held_out) for number in range(num_held_out)}
        for source in set(sources):
            batches = [batch for batch, name in enumerate(sources) if name == source]
            if len(batches) > 1 and held_out.isdisjoint(batches):
                held_out.add(batches[len(batches) // 2])
        return [batch in held_out for batch in range(count)]

    def split(self, samples: Sequence["BlockSample"]) -> tuple[list["BlockSample"], list["BlockSample"]]:
        """Returns the samples to tune on, and those that are held out."""
        parts = list["BlockSample"](), list["BlockSample"]()
        for sample, is_held_out in zip(samples, self.is_held_out([each.source for each in samples]), strict=True):
            parts[is_held_out].append(sample)
        return parts


class BlockOutputs:
    """Inputs and outputs of a block whose batches run twice, changed and then unchanged."""

    def __init__(self) -> None:
        self._by_run: dict[int, tuple[Arguments, Tensor]] = {}

    def add(self, run: int, arguments: Arguments, output: object) -> None:
        """Records a run, if the block returns a hidden state."""
        if (state := hidden_state(output)) is not None:
            self._by_run[run] = arguments, state

    def take(self, count: int) -> Iterator[tuple[int, Arguments, Tensor, Tensor]]:
        """Yields batch, changed inputs and output, and unchanged output; forgets them.

        Args:
            count: Number of batches. The unchanged run of a batch is this much later.
        """
        outputs, self._by_run = self._by_run, {}
        for run in range(count):
            if run in outputs and run + count in outputs:
                (inputs, output), (_, goal) = outputs[run], outputs[run + count]
                if output.shape == goal.shape:
                    yield run, inputs, output, goal


class BlockTuning:
    """Tunes the kept weights of a block.

    Args:
        matching: Settings.
        block: The block, whose parameters do not change.
        weights: Weights to tune, by parameter name in the block, in memory layout.
        keeps: Masks of these weights, bool.
        comm: The ranks, each with its own samples.
        ties: Change the gradients of some weights, so that weights that are equal stay equal.
        least_steps: Minimum number of steps, if the settings do not state a number.
    """

    def __init__(
        self,
        matching: BlockMatching,
        block: nn.Module,
        weights: TensorsByName,
        keeps: TensorsByName,
        comm: Comm = SINGLE_PROCESS,
        ties: Mapping[str, Tie] | None = None,
        least_steps: int = 1,
    ) -> None:
        self.matching, self.block, self.keeps, self.comm, self.ties = matching, block, keeps, comm, ties or {}
        self.least_steps = least_steps
        self.tuned = {name: _as_float32(weight).detach().clone().requires_grad_() for name, weight in weights.items()}
        fixed = chain(block.named_parameters(), block.named_buffers())
        self.fixed = {name: _as_float32(tensor.detach()) for name, tensor in fixed if name not in weights}
        self.device = next(iter(self.tuned.values())).device

    def __call__(self, tune: Sequence[BlockSample], held_out: Sequence[BlockSample]) -> TensorDict:
        """Tunes on samples, and returns the float32 weights with the lowest held-out error."""
        batches, ranks = self.comm(torch.tensor([float(len(tune)), 1.0], device=self.device))
        steps = self.matching.num_steps(float(batches / ranks), self.least_steps)
        groups = []
        for name, weight in self.tuned.items():
            mean_square = weight.detach().square().sum() / self.keeps[name].sum().clamp(min=1)
            groups.append(
                {"params": [weight], "lr": 0.0, "most": (self.matching.lr or PRUNED_LR) * math.sqrt(float(mean_square))}
            )
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
                if step == 1 and not any(weight.grad.any() for weight in self.tuned.values() if weight.grad is not None):
                    break  # the block is removed: its output layers are zero
                if step in evaluated_steps and (measured := self._measured(held_out)) < best:
                    best, state = measured, self._state()
        return state

    def _step(self, optimizer: torch.optim.Adam, sample: BlockSample) -> None:
        """Tunes on a sample. Its gradients end with this call, so that no memory holds them while errors are measured."""
        with torch.enable_grad():
            error, count = self._error(sample)
            gradients = torch.autograd.grad(error / count, list(self.tuned.values()), allow_unused=True)
        for (name, weight), gradient in zip(self.tuned.items(), gradients, strict=True):
            gradient = torch.zeros_like(weight) if gradient is None else gradient * self.keeps[name]
            weight.grad = self.ties[name](gradient) if name in self.ties else gradient
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

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of a block
            return functional_call(self.block, self.tuned | self.fixed, args, kwargs)

        with fresh_autocast_cache():  # Adam changes weights in place, so autocast's cached casts are stale
            output = hidden_state(call_with_copies(forward, args, kwargs))
        assert output is not None, "it has come out before"
        size = goal.square().sum(-1)
        errors = (output - goal).square().sum(-1) / torch.where(size > 0, size, 1)
        errors = errors if counts is None else errors[counts]
        return errors.sum(), torch.tensor(float(errors.numel()), device=errors.device).clamp(min=1)

    def _state(self) -> TensorDict:
        return {name: weight.detach().clone() for name, weight in self.tuned.items()}


def hidden_state(output: object) -> Tensor | None:
    """Returns the hidden states that a block returns: its first floating-point tensor."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def block_mask(run: Run, block: str, output: Tensor) -> Tensor | None:
    """Returns the non-padding tokens of a block's output, `[batch, length]`; None for all."""
    own_first = sorted(run.tokens, key=lambda layer: not layer.startswith(f"{block}."))
    fitting = (run.tokens[layer].to(output.device) for layer in own_first if run.tokens[layer].shape == output.shape[:-1])
    return next(fitting, None)


def _as_float32(tensor: Tensor) -> Tensor:
    """Returns floating-point tensors in float32, as normal tensors that can have gradients."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def match_blocks(
    model: nn.Module,
    values: LazyTensors,
    runs: Sequence[Run],
    matching: BlockMatching,
    comm: Comm = SINGLE_PROCESS,
    dense: Sequence[Run] | None = None,
    ties: Mapping[str, Tie] | None = None,
    progress: OnProgress | None = None,
) -> LazyTensors:
    """Tunes each block of a changed model to reproduce the dense block's output.

    All weights and norms of a block are tuned, after all blocks before it. Zeros stay zero, and layers with adapters do not
    change. The model does not change, either. Next to it, memory holds the new weights, and for each batch the input of a block
    and both outputs; these can spill to disk (`BlockStore.spill_folder`). Blocks that reproduce the dense output exactly, are
    called several times, or share parameters with other modules are not tuned.

    Args:
        model: The dense model.
        values: Changed parameters by name. Zeros are removed units or weights.
        runs: The batches, at least two on each rank, some of which are held out.
        matching: Settings.
        comm: The ranks, each with its own batches.
        dense: The same batches as the dense model runs them, if that differs.
        ties: Changes of gradients by parameter name.
        progress: Callback with the number of completed blocks and the total.

    Returns:
        The values, tuned, and all other tuned parameters, in their dtypes.
    """
    store, dense = store_of(model), dense or runs
    with evaluating_without_grad(model), attention_for_all_dtypes(model):  # also in runs, whose masks blocks receive
        matcher = _BlockMatcher(model, values, runs, matching, comm, ties or {}, progress)
        step = store.step(f"{matching} {values.key}", partial(runs_fingerprint, runs))
        with step, activation_files(store) as files, spilled_outputs(files, model, matcher.blocks.values()):
            Walk(list(matcher.sites()), matcher, comm, matcher.enter)([run.visit for run in (*runs, *dense)])
            matcher.stage()
            store.release()
    return values | matcher.new


@dataclass(eq=False)
class _BlockMatcher(Visitor):
    """Tunes each block that all runs have left. The second half of the runs is dense."""

    ends = 1  # one run continues to its end, to detect blocks that are called again

    model: nn.Module
    values: LazyTensors
    runs: Sequence[Run]
    matching: BlockMatching
    comm: Comm
    ties: Mapping[str, Tie]
    progress: OnProgress | None

    def __post_init__(self) -> None:
        model, self._store, self.untouched = self.model, store_of(self.model), range(len(self.runs), 2 * len(self.runs))
        self.matching = replace(self.matching, lr=self.matching.lr or REPAIRED_LR)
        holders = {
            (module, name): parameter for module in model.modules() for name, parameter in module.named_parameters(recurse=False)
        }
        separable = separable_blocks(model, holders.items())
        self.blocks = {name: module for name, module in model.named_modules() if module in separable}
        self.new, self._tuned = LazyTensors({}), TensorDict()
        self._block: nn.Module | None = None  # the block that runs are in, if blocks are loaded on demand
        self._outputs = BlockOutputs()

    def sites(self) -> Iterator[Site]:
        """Yields the beginning and end of each block, and changed modules outside of blocks."""
        inside = dict[nn.Module, str]()
        for name, block in self.blocks.items():
            modules = {f"{name}.{part}".rstrip("."): module for part, module in block.named_modules()}
            inside |= dict.fromkeys(block.modules(), name)
            changed = {part: module for part, module in modules.items() if part in self.values.modules}
            yield Site(block, changed, done=True)
            yield Site(block, modules, out=True)
        for name in self.values.modules:
            module = self.model.get_submodule(name)
            if module not in inside:
                yield Site(module, {name: module}, done=True)

    def enter(self, module: nn.Module) -> None:
        """Loads the block of a module, after staging the block that all runs have left."""
        block = self._store.owner.get(module)
        if block is not None and block is not self._block:
            self.stage()
            self._block = block
            self._store.load(block)
            values, _ = self._store.read_staged(block) or ({}, None)
            self._tuned = dict(values)

    def stage(self) -> None:
        """Stages the tuned parameters of the current block, or of a model in memory."""
        self.new |= self._store.stage(self._block, self._tuned)
        self._tuned, self._block = {}, None

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Records the input and output of a block."""
        self._outputs.add(run, arguments, output)

    def on_reentry(self, site: Site) -> None:
        """Raises if a block is called again after it was tuned."""
        if site.out:
            raise_block_called_again(next(iter(site.linears)))

    def complete(self, site: Site) -> None:
        """Tunes the block that all runs have left."""
        samples, name, differ = [], next(iter(site.linears)), False
        for run, inputs, output, goal in self._outputs.take(len(self.runs)):
            samples.append(BlockSample(inputs, goal, block_mask(self.runs[run], name, goal), self.runs[run].source))
            differ |= not torch.equal(output, goal)
        # each rank needs samples to tune on and samples to hold out
        too_few, changed = self.comm(torch.tensor([float(len(samples) < 2), float(differ)], device=self.comm.device)).tolist()
        known = any(part in self._tuned for part, _ in self._parameters(site))
        if changed and not known and not too_few:
            prefix, parameters = f"{name}.", dict(self._parameters(site))
            start = {part: self.values[part] if part in self.values else value.detach() for part, value in parameters.items()}
            weights = {part.removeprefix(prefix): value.to(parameters[part].device) for part, value in start.items()}
            keeps = {part: value != 0 for part, value in weights.items()}
            ties = {part.removeprefix(prefix): tie for part, tie in self.ties.items() if part in parameters}
            with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
                tuned = BlockTuning(self.matching, site.module, weights, keeps, self.comm, ties, LEAST_STEPS)(
                    *self.matching.split(samples)
                )
            new = {part: value.to(weights[part].dtype) for part, value in tuned.items()}
            if not all(torch.equal(value, weights[part]) for part, value in new.items()):
                self._tuned |= {f"{prefix}{part}": value for part, value in new.items()}
        if self.progress is not None:
            self.progress(list(self.blocks).index(name) + 1, len(self.blocks))

    def _parameters(self, site: Site) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters to tune, which exclude embeddings and layers with adapters."""
        adapted = tuple(f"{name}." for name, module in site.linears.items() if is_adapter(module))
        for name, module in site.linears.items():
            if not f"{name}.".startswith(adapted) and not isinstance(module, nn.Embedding):
                for part, parameter in module.named_parameters(recurse=False):
                    if parameter.is_floating_point():
                        yield f"{name}.{part}", parameter

    def parameters(self, site: Site) -> dict[str, TensorDict]:
        """Returns the new parameters of a stop: changed, or tuned where runs have left a block."""
        new = {name: self.values.of_module(name) for name in site.linears}
        for name in site.linears if site.out else ():
            tuned = {part: f"{name}.{part}" for part, _ in site.linears[name].named_parameters(recurse=False)}
            new[name] |= {part: self._tuned[full] for part, full in tuned.items() if full in self._tuned}
        return new


def check_enough_batches(matching: BlockMatching | None, count: int, comm: Comm) -> None:
    """Raises if a rank has fewer than two batches, of which some are held out."""
    if matching is not None and min(comm.gather(count)) < 2:
        per_rank, this_rank = ("", "") if comm is SINGLE_PROCESS else (" on each rank", " on this rank")
        raise ValueError(
            f"batches: match needs at least two batches{per_rank} (it holds some out), got {count}{this_rank}. Use smaller "
            "batches."
        )


def raise_block_called_again(linear: str) -> NoReturn:
    """Raises for a linear layer that would be pruned before another call."""
    raise ValueError(
        f"match: {linear} is called again after its block, or shares its weight. Exclude it with skip, or do not use match."
    )
