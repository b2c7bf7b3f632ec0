"""Repairs linear layers during a walk, and keeps the new weights beside the model.

`repair_linears` makes a `RepairVisitor` for all layers. A `Walk` calls it for one layer after the other:

1. `enter` stages the block that all runs have left, loads the next one, and takes its weights (`take`);
2. `observe` adds the inputs of a layer to its statistics, or keeps them if it compensates for residual errors;
3. `complete` computes the residual errors before the refit (`_residuals_before`), adds them with the inputs, and weights each
   token (`_token_weights`);
4. `_refit` sums statistics over ranks and calls `refit_linear`; `_residuals_after` updates the errors for the next layer;
5. `parameters` returns the new weights, with which all runs of the pruned model continue;
6. after the last layer, `finish` stages the rest and returns all new weights.
"""

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

from billhook.engine import ROWS, BlockStore, Comm, InputNorms, LazyTensors, ModulesByName, Run, Site, Visitor, by_parameter
from billhook.engine.passes import ActivationFiles, zeros
from billhook.linalg import TensorDict, TensorsByName, float64_device, widest_float
from billhook.model import matrix_of, sparse_support, to_layout, to_parameters
from billhook.progress import OnProgress
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.residuals import ResidualStatistics, TokenBuffer, as_float, non_padding

ADD: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
SAME: frozenset[Any] = frozenset({dropout, torch.dropout, Tensor.to, Tensor.contiguous})


@dataclass(frozen=True)
class LinearCalls:
    """Calls of linear layers in a run.

    Attributes:
        calls: Number of calls of each layer.
        predecessors: For each layer whose output is added to a sum, the layer that was added last before; None if unknown.
    """

    calls: dict[str, int]
    predecessors: dict[str, str | None]


def record_calls(layers: ModulesByName, run: Callable[[], object]) -> LinearCalls:
    """Runs a model once without gradients, and records the calls of its linear layers."""
    record = LinearCalls(dict.fromkeys(layers, 0), {})

    def mark(name: str, _: nn.Module, __: object, output: object) -> object:
        record.calls[name] += 1
        if not isinstance(output, Tensor):  # a router may also return its choice
            return output
        return _Marked.of(output, record.predecessors, linear=name)

    with ExitStack() as stack, torch.no_grad():
        for name, linear in layers.items():
            stack.callback(linear.register_forward_hook(partial(mark, name)).remove)
        run()
    return record


def combine_calls(records: Sequence[LinearCalls]) -> LinearCalls:
    """Combines the records of runs; contradictory predecessors are dropped."""
    calls, predecessors = dict(records[0].calls), dict(records[0].predecessors)
    for record in records[1:]:
        predecessors = dict(predecessors.items() & record.predecessors.items())
        calls = {name: max(count, record.calls[name]) for name, count in calls.items()}
    return LinearCalls(calls, predecessors)


def residual_order(record: LinearCalls, wanted: set[str]) -> dict[str, str | None]:
    """Orders layers that add to the same sum: each is mapped to the layer that added before.

    The output of a layer may be added after an inactive dropout or a cast, to the sum that contains another layer's output, as
    in a residual stream. Layers before the first wanted layer are left out, because they do not change. So are layers that do
    not share their sum, because there is no earlier error to compensate for.
    """
    known = {name: last for name, last in record.predecessors.items() if record.calls[name] == 1}
    predecessors: dict[str, str | None] = {}
    for name in wanted & known.keys():
        path = [name]
        while (last := known.get(path[-1])) is not None and last in known and last not in path:
            path.append(last)
        while path[-1] not in wanted:
            path.pop()
        predecessors |= dict(zip(path, [*path[1:], None], strict=True)) if len(path) > 1 else {}
    return predecessors


class _Marked(Tensor):
    """Output of a linear layer, or a sum with it; other results become plain tensors."""

    predecessors: dict[str, str | None]
    linear: str | None
    total: str | None

    @classmethod
    def of(cls, tensor: Tensor, predecessors: dict[str, str | None], linear: str | None = None, total: str | None = None) -> Self:
        marked = tensor.as_subclass(cls)
        marked.predecessors, marked.linear, marked.total = predecessors, linear, total
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with torch._C.DisableTorchFunctionSubclass():  # as in torch's own subclasses; results are marked below, or plain
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            result = result.as_subclass(Tensor)
        if func in SAME and isinstance(args[0], cls):
            return cls.of(result, args[0].predecessors, args[0].linear, args[0].total)
        if func in ADD and not kwargs and len(args) == 2:
            output, other = args if isinstance(args[0], cls) and args[0].linear else reversed(args)
            if isinstance(output, cls) and output.linear and isinstance(other, Tensor) and other.shape == output.shape:
                output.predecessors[output.linear] = other.total if isinstance(other, cls) else None
                return cls.of(result, output.predecessors, total=output.linear)
        return result


class _Linear:
    """A linear layer whose block is in memory: parameters, and statistics for its refit.

    Args:
        module: The linear layer, whose parameters may be replaced later.
        new: New parameters to start from; empty for its own.
        keep: Mask of kept inputs, if it is to be refitted.

    Attributes:
        dense: Weight, `[out_features, in_features]`, and bias in the dense model.
        start: Weight and bias before the refit.
        fitted: Parameters after the refit, in memory layout.
    """

    def __init__(self, module: nn.Module, new: TensorsByName, keep: Tensor | None) -> None:
        self.module = module
        self.dense = self.start = weight, bias = matrix_of(module)
        self.new = {part: value.to(weight.device) for part, value in new.items()}
        if new:
            self.start = to_layout(module, self.new["weight"]), None if bias is None else self.new["bias"]
        self.fitted: TensorDict = {}
        self.keep: Tensor | None = None
        if keep is not None:
            self.keep = keep.to(weight.device)
            # integers: indexing with bools causes a host sync
            self.kept_index, self.removed_index = (where.nonzero().flatten().to(weight.device) for where in (keep, ~keep))
        self.buffers: list[TokenBuffer] = []
        self.norms = InputNorms(weight.shape[1], weight.device)

    def begin(self, files: ActivationFiles | None) -> None:
        """Makes empty statistics, to fit to and to choose the ridge penalty, unless they exist."""
        if not self.buffers:
            weight, _ = self.start
            sizes = len(weight), len(self.kept_index)
            self.buffers = [TokenBuffer(ResidualStatistics(*sizes, weight.device, files)) for _ in range(2)]


@dataclass(eq=False)
class RepairVisitor(Visitor):
    """Gathers input statistics of layers, and refits each when all runs have reached it.

    The model does not change. To compensate for residual errors, each batch runs twice, the second time through the dense model.
    The residual of a layer, in addition to its old output, is r = W (x* - x) + s, with its input x* in the dense model and the
    shortfall s of the sum that it adds to. After its refit, that sum is short of r - (W' - W) x - (b' - b).

    Args:
        layers: All observed layers, by name.
        kept: Masks of kept inputs of the layers to refit.
        predecessors: For layers that share a sum, the layer that was added before. See `residual_order`.
        runs: The batches, with the non-padding tokens of each layer.
        ridges: Candidate ridge penalties.
        parts: Part of the data of each run: 1 if it chooses the ridge penalty, or else 0.
        comm: The ranks.
        new_params: New parameters of layers, except in runs of the dense model.
        progress: Callback with the number of refitted layers and the total.
        store: Block store of the model, in which new weights are staged.

    Attributes:
        files: Stores statistics and residuals on disk, if set.
        new: Staged parameters.
    """

    layers: ModulesByName
    kept: TensorsByName
    predecessors: Mapping[str, str | None]
    runs: Sequence[Run]
    ridges: Sequence[float]
    parts: Sequence[int]
    comm: Comm
    new_params: LazyTensors
    progress: OnProgress | None
    store: BlockStore

    def __post_init__(self) -> None:
        self.files: ActivationFiles | None = None
        self.untouched = range(len(self.runs), 2 * len(self.runs)) if self.predecessors else ()  # runs of the dense model
        self._block: nn.Module | None = None  # the block that runs are in
        self.new = LazyTensors({})
        self._linears: dict[str, _Linear] = {}
        self._tokens = dict[int, Tensor]()  # indices of non-padding tokens, by id of their mask
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._residuals: dict[str, dict[int, Tensor]] = {}  # by layer and run, of the sum that the layer adds to
        self._after = Counter(self.predecessors.values())
        self._done, self._refitted, self._known = set[str](), set[str](), set[str]()

    def take(self, names: Collection[str]) -> None:
        """Records the current weights of layers, and their given new parameters, before any run."""
        for name in names:  # in the same order on all ranks, which read sharded values together
            self._linears[name] = _Linear(self.layers[name], self.new_params.of_module(name), self.kept.get(name))

    def inside(self, block: nn.Module | None) -> list[str]:
        """Returns the names of the layers in a block, or outside all blocks."""
        return [name for name, linear in self.layers.items() if self.store.owner.get(linear) is block]

    def enter(self, module: nn.Module) -> None:
        """Loads the block of a module, after staging the block that all runs have left."""
        block = self.store.owner.get(module)
        if block is not None and block is not self._block:
            if self._block is not None:
                self.stage()
            self._block = self.store.load(module)
            self.take(self.inside(block))
            values, refitted = self.store.read_staged(block) or (LazyTensors({}), {})
            for name in refitted:  # results of an earlier process, with or without a refit
                self._known.add(name)
                if refitted[name]:
                    linear = self._linears[name]
                    linear.fitted = {part: value.to(linear.dense[0].device) for part, value in values.of_module(name).items()}
                    self._refitted.add(name)
        elif block is not None:
            self.store.load(block)

    @torch.no_grad()
    def stage(self) -> None:
        """Stages the new parameters of the current block, or outside all blocks, and drops them."""
        names = self.inside(self._block)
        new = {name: self.current(name) for name in names if name in self.kept}
        notes = {name: name in self._refitted for name in new}
        self.new |= self.store.stage(self._block, by_parameter(new), notes)
        self._block = None
        for name in names:
            self._linears.pop(name, None)

    def finish(self) -> LazyTensors:
        """Stages the last block and the layers outside all blocks, and returns all new values."""
        if self._block is not None:
            self.stage()
        self.stage()
        self.store.release()
        return self.new

    @property
    def not_refitted(self) -> list[str]:
        """The layers that had too few tokens."""
        return [name for name in self.kept if name not in self._refitted]

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Adds the inputs of a layer, or keeps them to compare. See `Visitor.observe`."""
        if name in self.predecessors:
            self._inputs.setdefault(name, {})[run] = inputs.detach()
        elif name in self.kept and name not in self._known and run < len(self.runs):  # not from runs of the dense model
            self._add(name, inputs, None, run, None)

    def complete(self, site: Site) -> None:
        """Refits the layers of a stop; raises if inputs are not finite."""
        for name in site.linears:
            inputs = self._inputs.pop(name, {})
            residuals = self._residuals_before(name, inputs)
            if name in self.kept and name not in self._known:
                weights = self._token_weights(name, residuals)
                for run in sorted(run for run in inputs if run < len(self.runs)):
                    self._add(name, inputs[run], residuals.get(run), run, weights.get(run))
                self._refit(name)
            if name in self.kept:
                self._done.add(name)
                if self.progress is not None:
                    self.progress(len(self._done), len(self.kept))
            if self._after[name]:
                self._residuals[name] = self._residuals_after(name, inputs, residuals)
            last = self.predecessors.get(name)
            self._after[last] -= 1
            if last is not None and not self._after[last]:
                self._residuals.pop(last, None)

    def parameters(self, site: Site) -> dict[str, TensorDict]:
        """Returns the new parameters of a stop's layers, in memory layout."""
        new = {name: self.current(name) for name in site.linears}
        return {name: parameters for name, parameters in new.items() if parameters}

    def current(self, name: str) -> TensorDict:
        """Returns a layer's current parameters in memory layout, with zeros for removed inputs."""
        linear = self._linears[name]
        if linear.fitted or linear.keep is None:
            return linear.fitted or linear.new
        weight, bias = linear.start
        return to_parameters(linear.module, torch.where(linear.keep, weight, 0), bias)

    def _add(self, name: str, inputs: Tensor, residual: Tensor | None, run: int, weights: Tensor | None) -> None:
        """Adds a call of a layer, with its residual; by default the output of removed inputs."""
        linear, counts = self._linears[name], non_padding(self.runs[run], name, inputs)
        linear.begin(self.files)
        linear.norms.add(inputs, counts)
        if residual is None and len(linear.removed_index):
            residual = as_float(inputs[..., linear.removed_index]) @ as_float(linear.start[0][:, linear.removed_index]).t()
        tokens = None
        if counts is not None:  # layers with the same mask share the indices
            mask = id(self.runs[run].tokens[name])
            if mask not in self._tokens:
                self._tokens[mask] = counts.flatten().nonzero().flatten()
            tokens = self._tokens[mask]
        kept = inputs[..., linear.kept_index] if len(linear.removed_index) else inputs
        linear.buffers[self.parts[run]].add(kept, residual, tokens, weights)

    def _token_weights(self, name: str, residuals: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Computes token weights, `[...]`, from residuals, `[..., out_features]`, by run.

        A few tokens have activations a thousand times larger than others, and would dominate the refit. A token with the squared
        residual s is therefore weighted by 2 m / (m + s), with the geometric mean m of s over all ranks. That is the weight of
        Cauchy's robust loss log(1 + s / m) in iteratively reweighted least squares, of which this is one iteration. Twice, so
        that a typical token has weight 1.
        """
        squares, weights = {}, {}
        sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self._linears[name].start[0].device))
        for run, residual in residuals.items():
            squares[run] = square = residual.square().sum(-1, dtype=widest_float(residual.device))
            keep = non_padding(self.runs[run], name, residual)
            counts = square > 0 if keep is None else (square > 0) & keep
            sums += torch.stack([torch.where(counts, square, 1).log().sum(), counts.sum()]).to(sums.device)
        self.comm.sum_(sums)
        for run, square in squares.items():
            mean = (sums[0] / sums[1]).exp().to(square)  # NaN if all residuals are 0
            weights[run] = torch.where(mean.isnan(), 1, 2 * mean / (mean + square))
        return weights

    def _refit(self, name: str) -> None:
        linear = self._linears[name]
        linear.begin(self.files)  # a rank may have no inputs
        parts = [buffer.flush() for buffer in linear.buffers]
        linear.buffers = []
        squares = linear.norms.squares.to(parts[0].tokens)  # in float64, so that one collective sums all
        self.comm.sum_(squares, *(sums for part in parts for sums in part.tensors()))
        bad = ~squares.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name}: {int(bad.sum())} input features contain NaN or infinity, the first is feature {first}.")
        tokens = torch.stack([part.tokens for part in parts]).tolist()
        if all(tokens) and sum(tokens) >= len(linear.kept_index):
            weight, bias = linear.start
            remaining = weight[:, linear.kept_index].to(parts[0].tokens.device)
            bias = None if bias is None else bias.to(remaining.device)
            kept, bias = refit_linear(remaining, bias, parts, self.ridges, self.comm, sparse_support(remaining))
            fitted = torch.zeros_like(weight)
            fitted[:, linear.kept_index] = kept.to(fitted.device)
            linear.fitted = to_parameters(linear.module, fitted, bias)
            self._refitted.add(name)

    def _residuals_before(self, name: str, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Computes residuals before the refit: W x* - W_S x_S + b* - b + s, `[..., out_features]`."""
        linear = self._linears[name]
        (dense, dense_bias), (weight, bias) = linear.dense, linear.start
        shift = None if dense_bias is None or bias is None or bias is dense_bias else as_float(dense_bias) - as_float(bias)
        earlier, pairs, residuals = self._residuals.get(self.predecessors.get(name) or "", {}), {}, {}
        for run, pruned_inputs in sorted(inputs.items()):
            dense_inputs = inputs.get(run + len(self.runs))
            if dense_inputs is not None and pruned_inputs.shape == dense_inputs.shape:
                pairs[run] = pruned_inputs, dense_inputs
                dtype = torch.promote_types(pruned_inputs.dtype, torch.float32)
                residuals[run] = zeros((*pruned_inputs.shape[:-1], len(weight)), dtype, pruned_inputs.device, self.files)
        for rows in _rows(weight) if pairs else ():
            columns = as_float(weight[rows]).t()
            dense_columns = columns if dense is weight else as_float(dense[rows]).t()
            for run, (pruned_inputs, dense_inputs) in pairs.items():
                kept_inputs = as_float(pruned_inputs)
                if linear.keep is not None:
                    kept_inputs = kept_inputs.masked_fill(~linear.keep, 0)
                if dense is weight:
                    residual = (as_float(dense_inputs) - kept_inputs) @ columns
                else:
                    residual = as_float(dense_inputs) @ dense_columns - kept_inputs @ columns
                if shift is not None:
                    residual += shift[rows]
                if run in earlier:
                    residual += earlier[run][..., rows].to(residual.device)
                residuals[run][..., rows] = residual
        return residuals

    def _residuals_after(self, name: str, inputs: Mapping[int, Tensor], residuals: dict[int, Tensor]) -> dict[int, Tensor]:
        """Updates residuals after the refit: subtracts (W' - W)_S x_S + b' - b, in place."""
        if name not in self._refitted:
            return residuals
        linear = self._linears[name]
        (weight, bias), fitted = linear.start, to_layout(linear.module, linear.fitted["weight"])
        for rows in _rows(weight):
            change = (as_float(fitted[rows, linear.kept_index]) - as_float(weight[rows, linear.kept_index])).t()
            for run, residual in residuals.items():
                residual[..., rows] -= as_float(inputs[run][..., linear.kept_index]) @ change
                if bias is not None:
                    residual[..., rows] -= as_float(linear.fitted["bias"][rows]) - as_float(bias[rows])
        return residuals


def _rows(weight: Tensor) -> list[slice]:
    """Returns the rows of a weight, in chunks that are converted to float32 at once."""
    return [slice(first, first + ROWS) for first in range(0, len(weight), ROWS)]
