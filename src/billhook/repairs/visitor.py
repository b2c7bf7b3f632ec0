"""Repairs linears during a walk over a model: gathers moments of their inputs and residuals, and keeps new weights beside it."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from typing_extensions import Self

from billhook.engine.batches import Run
from billhook.engine.comm import Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import ActivationFiles, zeros
from billhook.engine.statistics import ROWS, InputNorms
from billhook.engine.store import BlockStore
from billhook.engine.walk import Site, Visitor
from billhook.linalg import float64_device, widest_float
from billhook.model.layers import is_pruned, matrix_of, to_layout, to_parameters
from billhook.progress import OnProgress
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.residuals import ResidualStatistics, TokenBuffer, as_float, make_folds, non_padding

ADD: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
SAME: frozenset[Any] = frozenset({dropout, torch.dropout, Tensor.to, Tensor.contiguous})


@dataclass(frozen=True)
class LinearCalls:
    """How often each linear is called in one run; where its output is added to something, the one added there last, if known."""

    calls: dict[str, int]
    before: dict[str, str | None]


def record_calls(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> LinearCalls:
    """Runs a model once, without gradients, and records its linears."""
    shown = LinearCalls(dict.fromkeys(linears, 0), {})

    def mark(name: str, _: nn.Module, __: object, output: object) -> object:
        shown.calls[name] += 1
        if not isinstance(output, Tensor):  # a router may be a linear that returns what it has chosen, too
            return output
        return _Marked.of(output, shown.before, linear=name)

    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(mark, name)).remove)
        run()
    return shown


def combine_calls(shown: Sequence[LinearCalls]) -> LinearCalls:
    """Combines the facts of runs, one at least; where they differ about what was added before, that is not known."""
    before = shown[0].before
    for run in shown[1:]:
        before = {name: last for name, last in before.items() if name in run.before and run.before[name] == last}
    return LinearCalls({name: max(run.calls[name] for run in shown) for name in shown[0].calls}, before)


def residual_order(shown: LinearCalls, wanted: set[str]) -> dict[str, str | None]:
    """Orders linears that add to one sum in turn, with those between them: each is followed by the one that added there before.

    The output of a linear may first of all be added to something else, after no more than a dropout that is off or a cast; and
    that may be the very sum that contains another linear's output, as in a residual stream.

    Linears before the first wanted one compute as ever and are left out, and so are those that have a sum to themselves: nothing
    that others have lost can be made up for there.
    """
    known = {name: last for name, last in shown.before.items() if shown.calls[name] == 1}
    before: dict[str, str | None] = {}
    for name in wanted & known.keys():
        path = [name]
        while (last := known.get(path[-1])) is not None and last in known and last not in path:
            path.append(last)
        while path[-1] not in wanted:
            path.pop()
        before |= dict(zip(path, [*path[1:], None], strict=True)) if len(path) > 1 else {}
    return before


class _Marked(Tensor):
    """The output of a linear, or a sum that contains it; results computed from it are plain tensors, except for the next sum."""

    before: dict[str, str | None]
    linear: str | None
    total: str | None

    @classmethod
    def of(cls, tensor: Tensor, before: dict[str, str | None], linear: str | None = None, total: str | None = None) -> Self:
        marked = tensor.as_subclass(cls)
        marked.before, marked.linear, marked.total = before, linear, total
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with torch._C.DisableTorchFunctionSubclass():  # as torch's own subclasses do: the result is marked below, or is plain
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            result = result.as_subclass(Tensor)
        if func in SAME and isinstance(args[0], cls):
            return cls.of(result, args[0].before, args[0].linear, args[0].total)
        if func in ADD and not kwargs and len(args) == 2:
            output, other = args if isinstance(args[0], cls) and args[0].linear else reversed(args)
            if isinstance(output, cls) and output.linear and isinstance(other, Tensor) and other.shape == output.shape:
                output.before[output.linear] = other.total if isinstance(other, cls) else None
                return cls.of(result, output.before, total=output.linear)
        return result


class _Linear:
    """A linear whose block is in memory: its parameters, and the moments of which it is refitted.

    Args:
        module: The linear, in which others' parameters may stand later.
        new: Other parameters that it is to have; none: its own.
        keep: Which inputs are kept, if it is to be refitted.

    Attributes:
        dense: The weight, `[out_features, in_features]`, and the bias in the whole model.
        start: The same before a refit.
        fitted: The parameters after it, as they lie in memory.
    """

    def __init__(self, module: nn.Module, new: Mapping[str, Tensor], keep: Tensor | None) -> None:
        self.module = module
        self.dense = self.start = weight, bias = matrix_of(module)
        self.new = {part: value.to(weight.device) for part, value in new.items()}
        if new:
            self.start = to_layout(module, self.new["weight"]), None if bias is None else self.new["bias"]
        self.fitted: dict[str, Tensor] = {}
        self.keep: Tensor | None = None
        if keep is not None:
            self.keep = keep.to(weight.device)
            # numbers, as an index by bools waits for the device
            self.stays, self.goes = (where.nonzero().flatten().to(weight.device) for where in (keep, ~keep))
        self.moments: list[ResidualStatistics] = []
        self.buffers: list[TokenBuffer] = []
        self.norms = InputNorms(weight.shape[1], weight.device)

    def begin(self, parts: int, files: ActivationFiles | None) -> None:
        """Has empty moments of each part of the data, if there are none."""
        if not self.moments:
            weight, _ = self.start
            self.moments = [ResidualStatistics(len(weight), len(self.stays), weight.device, files) for _ in range(parts)]
            self.buffers = [TokenBuffer(moments) for moments in self.moments]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters so far, as they lie in memory: at least with zeros for removed inputs."""
        if self.fitted or self.keep is None:
            return self.fitted or self.new
        weight, bias = self.start
        return to_parameters(self.module, torch.where(self.keep, weight, 0), bias)


class RepairVisitor(Visitor):
    """Gathers moments of the inputs of linears, and refits each when all runs have been there; the model stays as it is.

    Where linears are to catch up, runs come in two series of the same batches, the second of the whole model. A linear then owes,
    in addition to its old outputs, d = W (x* - x) + s: x* is its input in the whole model, and s the shortfall of the sum to
    which it adds. Once it has been refitted, that sum is short of d - (W' - W) x - (b' - b).

    Args:
        linears: All that are looked at, by name.
        kept: Of those to refit, which inputs are kept.
        before: Of those that are to catch up or to be followed, the linear that has added to the same sum before.
        runs: The batches, which know the tokens that count for each linear.
        ridges: Candidates for the ridge, which are tried on data that is held out.
        parts: The part of the data that each run belongs to.
        held_out: The parts that are held out, in turn.
        comm: The ranks.
        given: Other parameters that linears have except in runs of the whole model; also of ones not refitted.
        progress: Is called with how many linears are done, and of how many.
        store: Where blocks come from, and where new weights are staged.

    Attributes:
        files: Keeps moments, and the residuals of each run, elsewhere than in memory.
        new: What has been staged.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        kept: Mapping[str, Tensor],
        before: Mapping[str, str | None],
        runs: Sequence[Run],
        ridges: Sequence[float],
        parts: Sequence[int],
        held_out: Sequence[int],
        comm: Comm,
        given: LazyTensors | None,
        progress: OnProgress | None,
        store: BlockStore,
    ) -> None:
        self.files: ActivationFiles | None = None
        self._progress, self._done = progress, set[str]()
        self._modules, self._kept, self._before, self._runs = linears, kept, before, runs
        self._ridges, self._parts, self._held_out, self._comm = ridges, parts, held_out, comm
        self._given, self._store = given or LazyTensors({}), store
        self._block: nn.Module | None = None  # in which runs are
        self.new = LazyTensors({})
        self._linears: dict[str, _Linear] = {}
        self._tokens = dict[int, Tensor]()  # by the mask that says which count
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._residuals: dict[str, dict[int, Tensor]] = {}  # by linear and run, of the sum that it has added to
        self._after = Counter(before.values())
        self._refitted, self._known = set[str](), set[str]()

    def take(self, names: Collection[str]) -> None:
        """Takes the weights that linears have now, before any run comes to them, and the other parameters that are given."""
        for name in names:  # in one order, as ranks read what is given together
            self._linears[name] = _Linear(self._modules[name], self._given.of_module(name), self._kept.get(name))

    def inside(self, block: nn.Module | None) -> list[str]:
        """Names the linears of a block, or those that are in none."""
        return [name for name, linear in self._modules.items() if self._store.owner.get(linear) is block]

    def enter(self, module: nn.Module) -> None:
        """Has the block of a module in memory; another one, which all runs have passed, is staged first."""
        block = self._store.owner.get(module)
        if block is not None and block is not self._block:
            if self._block is not None:
                self.stage()
            self._block = self._store.load(module)
            self.take(self.inside(block))
            values, refitted = self._store.known(block) or (LazyTensors({}), {})
            for name in refitted:  # what an earlier process has made of it, or has left without a refit
                self._known.add(name)
                if refitted[name]:
                    linear = self._linears[name]
                    linear.fitted = {part: value.to(linear.dense[0].device) for part, value in values.of_module(name).items()}
                    self._refitted.add(name)
        elif block is not None:
            self._store.load(block)

    @torch.no_grad()
    def stage(self) -> None:
        """Stages what has become of the linears of the block that is in memory, or of those in none, and lets go of them."""
        names = self.inside(self._block)
        new = {name: self.own(name) for name in names if name in self._kept}
        notes = {name: name in self._refitted for name in new}
        self.new |= self._store.stage(self._block, by_parameter(new), notes)
        self._block = None
        for name in names:
            self._linears.pop(name, None)

    def finish(self) -> LazyTensors:
        """Stages what is left, of the last block and of linears in none, and returns all that has been staged."""
        if self._block is not None:
            self.stage()
        self.stage()
        self._store.release()
        return self.new

    @property
    def catches_up(self) -> bool:
        """True if runs come in two series, the second of the whole model."""
        return bool(self._before)

    @property
    def left(self) -> dict[str, bool]:
        """True for each linear that was left without a refit."""
        return {name: name not in self._refitted for name in self._kept}

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Adds the inputs of a linear, or keeps them until they can be compared with the whole model's."""
        if name in self._before:
            self._inputs.setdefault(name, {})[run] = inputs.detach()
        elif name in self._kept and name not in self._known and run < len(self._runs):  # not again of the whole model
            self._add(name, inputs, None, run, None)

    def complete(self, site: Site) -> None:
        """Refits the linears of a site; refuses inputs that are not finite."""
        for name in site.linears:
            inputs = self._inputs.pop(name, {})
            residuals = self._compared(name, inputs)
            if name in self._kept and name not in self._known:
                squares = {run: _squares(residual) for run, residual in residuals.items()}
                typical = self._typical(name, squares)
                for run in sorted(run for run in inputs if run < len(self._runs)):
                    weights = _token_weights(squares[run], typical) if run in squares else None
                    self._add(name, inputs[run], residuals.get(run), run, weights)
                self._refit(name)
            if name in self._kept:
                self._done.add(name)
                if self._progress is not None:
                    self._progress(len(self._done), len(self._kept))
            if self._after[name]:
                self._residuals[name] = self._left_over(name, inputs, residuals)
            last = self._before.get(name)
            self._after[last] -= 1
            if last is not None and not self._after[last]:
                self._residuals.pop(last, None)

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new parameters of a site's linears, as they lie in memory."""
        new = {name: self.own(name) for name in site.linears}
        return {name: parameters for name, parameters in new.items() if parameters}

    def own(self, name: str) -> dict[str, Tensor]:
        """Returns a linear's new parameters so far, as they lie in memory: at least with zeros for removed inputs."""
        return self._linears[name].parameters

    def _add(self, name: str, inputs: Tensor, residual: Tensor | None, run: int, weights: Tensor | None) -> None:
        """Adds the inputs of a linear in one call, and what it falls short of: by default of what removed inputs gave."""
        linear, counts = self._linears[name], non_padding(self._runs[run], name, inputs)
        linear.begin(max(*self._held_out, 1) + 1, self.files)
        linear.norms.add(inputs, counts)
        if residual is None and len(linear.goes):
            residual = as_float(inputs[..., linear.goes]) @ as_float(linear.start[0][:, linear.goes]).t()
        tokens = None
        if counts is not None:  # where the tokens are that count, which linears with one mask have in common
            mask = id(self._runs[run].tokens[name])
            if mask not in self._tokens:
                self._tokens[mask] = counts.flatten().nonzero().flatten()
            tokens = self._tokens[mask]
        kept = inputs[..., linear.stays] if len(linear.goes) else inputs
        linear.buffers[self._parts[run]].add(kept, residual, tokens, weights)

    def _typical(self, name: str, squares: Mapping[int, Tensor]) -> Tensor:
        """Computes the geometric mean m of the squares of what tokens lack, over all ranks; NaN if none lacks anything.

        A few tokens carry numbers a thousand times as large as others, and would alone decide what a refit makes good; so a
        token counts 2 m / (m + its own square): one that lacks as much as others once, and none without bound.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self._linears[name].start[0].device))
        for run, of_run in squares.items():
            keep = non_padding(self._runs[run], name, of_run[..., None])
            lacks = of_run > 0 if keep is None else (of_run > 0) & keep
            sums += torch.stack([torch.where(lacks, of_run, 1).log().sum(), lacks.sum()]).to(sums.device)
        self._comm.sum_(sums)
        return (sums[0] / sums[1]).exp()

    def _refit(self, name: str) -> None:
        linear = self._linears[name]
        linear.begin(max(*self._held_out, 1) + 1, self.files)  # a rank may have had no inputs
        for buffer in linear.buffers:
            buffer.empty()
        parts, linear.moments, linear.buffers = linear.moments, [], []
        squares = linear.norms.squares.to(parts[0].tokens)  # in float64, so that all goes in one collective
        self._comm.sum_(squares, *(sums for part in parts for sums in part.tensors()))
        bad = ~squares.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name}: NaN or infinite inputs in {int(bad.sum())} features, the first in feature {first}")
        folds = make_folds(parts, self._held_out)
        if folds and sum(part.tokens for part in parts) >= len(linear.stays):
            weight, bias = linear.start
            remaining = weight[:, linear.stays].to(parts[0].tokens.device)
            bias = None if bias is None else bias.to(remaining.device)
            kept, bias = refit_linear(remaining, bias, folds, parts, self._ridges, self._comm, _support(remaining))
            fitted = torch.zeros_like(weight)
            fitted[:, linear.stays] = kept.to(fitted.device)
            linear.fitted = to_parameters(linear.module, fitted, bias)
            self._refitted.add(name)

    def _compared(self, name: str, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Computes what each token lacks without a refit, in each run that can be compared with the whole model's.

        That is d and what removed inputs gave: W x* - W_S x_S + b* - b + s, `[..., out_features]`.
        """
        linear = self._linears[name]
        (dense, dense_bias), (weight, bias) = linear.dense, linear.start
        shift = None if dense_bias is None or bias is None or bias is dense_bias else as_float(dense_bias) - as_float(bias)
        before, pairs, residuals = self._residuals.get(self._before.get(name) or "", {}), {}, {}
        for run, cut in sorted(inputs.items()):
            uncut = inputs.get(run + len(self._runs))
            if uncut is not None and cut.shape == uncut.shape:
                pairs[run] = cut, uncut
                dtype = torch.promote_types(cut.dtype, torch.float32)
                residuals[run] = zeros((*cut.shape[:-1], len(weight)), dtype, cut.device, self.files)
        for rows in _rows(weight) if pairs else ():
            columns = as_float(weight[rows]).t()
            dense_columns = columns if dense is weight else as_float(dense[rows]).t()
            for run, (cut, uncut) in pairs.items():
                stays = as_float(cut) if linear.keep is None else as_float(cut).masked_fill(~linear.keep, 0)
                if dense is weight:
                    residual = (as_float(uncut) - stays) @ columns
                else:
                    residual = as_float(uncut) @ dense_columns - stays @ columns
                if shift is not None:
                    residual += shift[rows]
                if run in before:
                    residual += before[run][..., rows].to(residual.device)
                residuals[run][..., rows] = residual
        return residuals

    def _left_over(self, name: str, inputs: Mapping[int, Tensor], residuals: dict[int, Tensor]) -> dict[int, Tensor]:
        """Computes what the sum is short of after the refit, in the place of what it lacked: less (W' - W)_S x_S + b' - b."""
        if name not in self._refitted:
            return residuals
        linear = self._linears[name]
        (weight, bias), fitted = linear.start, to_layout(linear.module, linear.fitted["weight"])
        for rows in _rows(weight):
            change = (as_float(fitted[rows, linear.stays]) - as_float(weight[rows, linear.stays])).t()
            for run, residual in residuals.items():
                residual[..., rows] -= as_float(inputs[run][..., linear.stays]) @ change
                if bias is not None:
                    residual[..., rows] -= as_float(linear.fitted["bias"][rows]) - as_float(bias[rows])
        return residuals


def _squares(residual: Tensor) -> Tensor:
    """Returns the square of what each token lacks, in float64 where there is that."""
    return residual.square().sum(-1, dtype=widest_float(residual.device))


def _token_weights(squares: Tensor, typical: Tensor) -> Tensor:
    """Returns how much each token counts, of the square of what it lacks; all alike where no token lacks anything."""
    typical = typical.to(squares)
    return torch.where(typical.isnan(), 1, 2 * typical / (typical + squares))


def _support(weight: Tensor) -> Tensor | None:
    """Finds the weights that are not zero; None where so few are zero that the weight is not pruned."""
    nonzero = weight != 0
    return nonzero if is_pruned(int((~nonzero).sum()), nonzero.numel()) else None


def _rows(weight: Tensor) -> list[slice]:
    """Returns the rows of a weight, as many of them at a time as are in float32 at once."""
    return [slice(first, first + ROWS) for first in range(0, len(weight), ROWS)]
