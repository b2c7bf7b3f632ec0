"""Repairs linears during a walk over a model: gathers moments of their inputs and debts, and keeps the new weights aside."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from typing_extensions import Self

from billhook.bar import Told
from billhook.engine.batches import Run
from billhook.engine.comm import ALONE, Comm
from billhook.engine.lazy import LazyTensors
from billhook.engine.passes import ActivationFiles, zeros
from billhook.engine.statistics import ROWS, InputNorms
from billhook.engine.walk import Site, Visitor
from billhook.linalg import float64_device, widest_float
from billhook.model.linears import as_it_lies, is_pruned, matrix_of, turned
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.moments import OwedMoments, Pool, counting, folds_of, wide

ADD: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
SAME: frozenset[Any] = frozenset({dropout, torch.dropout, Tensor.to, Tensor.contiguous})


@dataclass(frozen=True)
class Linears:
    """How often each linear is called in one run; where its output is added to something, the one added there last, if known."""

    calls: dict[str, int]
    before: dict[str, str | None]


def seen(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> Linears:
    """Runs a model once, without gradients, and records its linears."""
    found = Linears(dict.fromkeys(linears, 0), {})

    def mark(name: str, _: nn.Module, __: object, output: object) -> object:
        found.calls[name] += 1
        if not isinstance(output, Tensor):  # a router may be a linear that returns what it has chosen, too
            return output
        return _Marked.of(output, found.before, linear=name)

    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(mark, name)).remove)
        run()
    return found


def agreed(shown: Sequence[Linears]) -> Linears:
    """Combines the facts of runs, one at least; where they differ about what was added before, that is not known."""
    before = {
        name: last
        for name, last in shown[0].before.items()
        if all(name in run.before and run.before[name] == last for run in shown)
    }
    return Linears({name: max(run.calls[name] for run in shown) for name in shown[0].calls}, before)


def followed(shown: Linears, wanted: set[str]) -> dict[str, str | None]:
    """Orders linears that add to one sum in turn, with those between them: each is followed by the one that added there before.

    The output of a linear may first of all be added to something else, after no more than a dropout that is off or a cast; and
    that may be the very sum that contains another linear's output, as in a residual stream.

    Linears before the first wanted one compute as ever and are left out, and so are those that have a sum to themselves: nothing
    that others have lost can be made up for there.
    """
    known = {name: last for name, last in shown.before.items() if shown.calls[name] == 1}
    found: dict[str, str | None] = {}
    for name in wanted & known.keys():
        path = [name]
        while (last := known.get(path[-1])) is not None and last in known and last not in path:
            path.append(last)
        while path[-1] not in wanted:
            path.pop()
        found |= dict(zip(path, [*path[1:], None], strict=True)) if len(path) > 1 else {}
    return found


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
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            result = result.as_subclass(Tensor)
        if func in SAME and isinstance(args[0], cls):
            return cls.of(result, args[0].before, args[0].linear, args[0].total)
        if func in ADD and not kwargs and len(args) == 2:
            own, other = args if isinstance(args[0], cls) and args[0].linear else reversed(args)
            if isinstance(own, cls) and own.linear and isinstance(other, Tensor) and other.shape == own.shape:
                own.before[own.linear] = other.total if isinstance(other, cls) else None
                return cls.of(result, own.before, total=own.linear)
        return result


Matrix = tuple[Tensor, Tensor | None]
"""The weight of a linear, `[out_features, in_features]`, and its bias."""


class RepairVisitor(Visitor):
    """Gathers moments of the inputs of linears, and refits each when all runs have been there; the model stays as it is.

    Where linears are to catch up, runs come in two series of the same batches, the second of the whole model. A linear then owes,
    in addition to its old outputs, d = W (x* - x) + s: x* is its input in the whole model, and s the shortfall of the sum to
    which it adds. Once it has been refitted, that sum is short of d - (W' - W) x - (b' - b).

    Args:
        linears: All linears of the model, by name.
        kept: Of those to refit, which inputs are kept.
        before: Of those that are to catch up or to be followed, the linear that has added to the same sum before.
        runs: The batches, which know the tokens that count for each linear.
        ridges: Candidates for the ridge, which are tried on data that is held out.
        parts: The part of the data that each run belongs to.
        held_out: The parts that are held out, in turn.
        comm: The ranks.
        given: Other parameters that linears have except in runs of the whole model; also of ones not refitted.
        progress: Is called with how many linears are done, and of how many.

    Attributes:
        files: Keeps moments, and the debts of each run, elsewhere than in memory.
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
        comm: Comm = ALONE,
        given: LazyTensors | None = None,
        progress: Told | None = None,
    ) -> None:
        self.files: ActivationFiles | None = None
        self._progress, self._done = progress, set[str]()
        self._linears, self._before, self._runs = linears, before, runs
        self._ridges, self._parts, self._held_out, self._comm = ridges, parts, held_out, comm
        self._given, self._here = given or LazyTensors({}), dict[str, dict[str, Tensor]]()
        self._whole, self._old = dict[str, Matrix](), dict[str, Matrix]()  # others may stand in the linears meanwhile
        self._kept = dict(kept)
        self._stays, self._goes = dict[str, Tensor](), dict[str, Tensor]()  # numbers, as an index by bools waits for the device
        self._tokens = dict[int, Tensor]()  # by the mask that says which count
        self._moments: dict[str, tuple[list[OwedMoments], InputNorms]] = {}
        self._pools: dict[str, list[Pool]] = {}
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._short: dict[str, dict[int, Tensor]] = {}  # by linear and run, of the sum that it has added to
        self._after = Counter(before.values())
        self._new: dict[str, dict[str, Tensor]] = {}
        self._refitted, self._known = set[str](), set[str]()

    def take(self, names: Collection[str]) -> None:
        """Takes the weights that linears have now, before any run comes to them, and the other parameters that are given."""
        self._whole |= {name: matrix_of(self._linears[name]) for name in names}
        for name in (name for name in names if name in self._given.modules):  # in one order, as ranks read them together
            device = self._whole[name][0].device
            self._here[name] = {part: value.to(device) for part, value in self._given.of_module(name).items()}
        self._old |= {name: self._start(name) for name in names}
        for name in self._kept.keys() & names:
            keep, device = self._kept[name], self._whole[name][0].device
            self._kept[name] = keep.to(device)
            self._stays[name], self._goes[name] = (where.nonzero().flatten().to(device) for where in (keep, ~keep))

    def know(self, name: str, new: dict[str, Tensor] | None) -> None:
        """Takes what an earlier process has made of a linear, instead of a refit; None if it was left without one."""
        self._known.add(name)
        if new is not None:
            self._new[name] = {part: value.to(self._whole[name][0].device) for part, value in new.items()}
            self._refitted.add(name)

    def drop(self, names: Iterable[str]) -> None:
        """Lets go of linears whose new parameters are kept elsewhere."""
        for name in names:
            for own in (self._whole, self._old, self._new, self._here):
                own.pop(name, None)

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
            lacking = self._compared(name, inputs)
            if name in self._kept and name not in self._known:
                lost = {run: _squares(lacks) for run, lacks in lacking.items()}
                typical = self._typical(name, lost)
                for run in range(len(self._runs)):
                    if run in inputs:
                        weights = _counted(lost[run], typical) if run in lost else None
                        self._add(name, inputs[run], lacking.get(run), run, weights)
                self._refit(name)
            if name in self._kept:
                self._done.add(name)
                if self._progress is not None:
                    self._progress(len(self._done), len(self._kept))
            if self._after[name]:
                self._short[name] = self._still(name, inputs, lacking)
            last = self._before.get(name)
            self._after[last] -= 1
            if last is not None and not self._after[last]:
                self._short.pop(last, None)

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new parameters of a site's linears, as they lie in memory."""
        given = {name: self._here[name] for name in site.linears if name in self._here and name not in self._kept}
        return given | {name: self.own(name) for name in site.linears if name in self._kept}

    def own(self, name: str) -> dict[str, Tensor]:
        """Returns a linear's new parameters so far, as they lie in memory: at least with zeros for removed inputs."""
        weight, bias = self._old[name]
        return self._new.get(name) or as_it_lies(self._linears[name], torch.where(self._kept[name], weight, 0), bias)

    def _add(self, name: str, inputs: Tensor, lacking: Tensor | None, run: int, weights: Tensor | None) -> None:
        counts, stays, goes = counting(self._runs[run], name, inputs), self._stays[name], self._goes[name]
        _, norms = self._of(name)
        norms.add(inputs, counts)
        own = inputs[..., stays] if len(goes) else inputs
        if lacking is None and len(goes):
            lacking = wide(inputs[..., goes]) @ wide(self._old[name][0][:, goes]).t()
        tokens = None if counts is None else self._places(run, name, counts)
        self._pools[name][self._parts[run]].add(own, lacking, tokens, weights)

    def _places(self, run: int, name: str, counts: Tensor) -> Tensor:
        """Returns where the tokens of a run are that count, which linears with one mask have in common."""
        mask = id(self._runs[run].tokens[name])
        if mask not in self._tokens:
            self._tokens[mask] = counts.flatten().nonzero().flatten()
        return self._tokens[mask]

    def _typical(self, name: str, lost: Mapping[int, Tensor]) -> Tensor:
        """Computes the geometric mean m of the squares of what tokens lack, over all ranks; NaN if none lacks anything.

        A few tokens carry numbers a thousand times as large as others, and would alone decide what a refit makes good; so a
        token counts 2 m / (m + its own square): one that lacks as much as others once, and none without bound.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self._old[name][0].device))
        for run, squares in lost.items():
            keep = counting(self._runs[run], name, squares[..., None])
            lacks = squares > 0 if keep is None else (squares > 0) & keep
            sums += torch.stack([torch.where(lacks, squares, 1).log().sum(), lacks.sum()]).to(sums.device)
        self._comm.sum_(sums)
        return (sums[0] / sums[1]).exp()

    def _start(self, name: str) -> Matrix:
        """Returns the weight and bias of a linear before it is refitted."""
        given, (weight, bias) = self._here.get(name), self._whole[name]
        if given is None:
            return weight, bias
        new = turned(self._linears[name], given["weight"])
        return new, None if bias is None else given["bias"]

    def _of(self, name: str) -> tuple[list[OwedMoments], InputNorms]:
        """Returns the moments of inputs that are kept and of what is lacking, by part, and the norms of all inputs."""
        if name not in self._moments:
            (weight, _), stays, parts = self._old[name], self._stays[name], max(*self._held_out, 1) + 1
            own = [OwedMoments(len(weight), len(stays), weight.device, self.files) for _ in range(parts)]
            self._moments[name] = own, InputNorms(weight.shape[1], weight.device)
            self._pools[name] = [Pool(one) for one in own]
        return self._moments[name]

    def _refit(self, name: str) -> None:
        (parts, norms), stays = self._of(name), self._stays[name]
        for pool in self._pools.pop(name):
            pool.empty()
        del self._moments[name]
        squares = norms.squares.to(parts[0].tokens)  # in float64, so that all goes in one collective
        self._comm.sum_(squares, *(sums for part in parts for sums in part.tensors()))
        bad = ~squares.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name}: NaN or infinite inputs in {int(bad.sum())} features, the first in feature {first}")
        folds = folds_of(parts, self._held_out)
        if folds and sum(part.tokens for part in parts) >= len(stays):
            weight, bias = self._old[name]
            left = weight[:, stays].to(parts[0].tokens.device)
            bias = None if bias is None else bias.to(left.device)
            kept, bias = refit_linear(left, bias, folds, parts, self._ridges, self._comm, _support(left))
            new = torch.zeros_like(weight)
            new[:, stays] = kept.to(new.device)
            self._new[name] = as_it_lies(self._linears[name], new, bias)
            self._refitted.add(name)

    def _compared(self, name: str, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Computes what each token lacks without a refit, in each run that can be compared with the whole model's.

        That is d and what removed inputs gave: W x* - W_S x_S + b* - b + s, `[..., out_features]`.
        """
        later = {run: (cut, inputs.get(run + len(self._runs))) for run, cut in sorted(inputs.items())}
        pairs = {run: (cut, whole) for run, (cut, whole) in later.items() if whole is not None and cut.shape == whole.shape}
        short, keep = self._short.get(self._before.get(name) or "", {}), self._kept.get(name)
        (given, before), (weight, bias) = self._whole[name], self._old[name]
        shift = None if before is None or bias is None or bias is before else wide(before) - wide(bias)
        found = {run: self._owed(cut, len(weight)) for run, (cut, _) in pairs.items()}
        for rows in _rows(weight) if pairs else ():
            own = wide(weight[rows]).t()
            dense = own if given is weight else wide(given[rows]).t()
            for run, (cut, whole) in pairs.items():
                stays = wide(cut) if keep is None else wide(cut).masked_fill(~keep, 0)
                lacks = (wide(whole) - stays) @ own if given is weight else wide(whole) @ dense - stays @ own
                if shift is not None:
                    lacks += shift[rows]
                if run in short:
                    lacks += short[run][..., rows].to(lacks.device)
                found[run][..., rows] = lacks
        return found

    def _owed(self, inputs: Tensor, rows: int) -> Tensor:
        """Returns room for what a run owes, where debts are kept: in float32, or float64 if the inputs are."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        return zeros((*inputs.shape[:-1], rows), dtype, inputs.device, self.files)

    def _still(self, name: str, inputs: Mapping[int, Tensor], lacking: dict[int, Tensor]) -> dict[int, Tensor]:
        """Computes what the sum is short of with the new weights, in the place of what it lacks: less (W' - W)_S x_S + b' - b."""
        if name not in self._refitted:
            return lacking
        own, stays, (weight, bias) = self.own(name), self._stays[name], self._old[name]
        new = turned(self._linears[name], own["weight"])
        for rows in _rows(weight):
            more = (wide(new[rows, stays]) - wide(weight[rows, stays])).t()
            for run, lacks in lacking.items():
                lacks[..., rows] -= wide(inputs[run][..., stays]) @ more
                if bias is not None:
                    lacks[..., rows] -= wide(own["bias"][rows]) - wide(bias[rows])
        return lacking


def _squares(lacks: Tensor) -> Tensor:
    """Returns the square of what each token lacks, in float64 where there is that."""
    return lacks.square().sum(-1, dtype=widest_float(lacks.device))


def _counted(lost: Tensor, typical: Tensor) -> Tensor:
    """Returns how much each token counts, of the square of what it lacks; all alike where no token lacks anything."""
    typical = typical.to(lost)
    return torch.where(typical.isnan(), 1, 2 * typical / (typical + lost))


def _support(weight: Tensor) -> Tensor | None:
    """Finds the weights that are not zero; None where so few are zero that the weight is not pruned."""
    there = weight != 0
    return there if is_pruned(int((~there).sum()), there.numel()) else None


def _rows(weight: Tensor) -> list[slice]:
    """Returns the rows of a weight, as many of them at a time as are in float32 at once."""
    return [slice(first, first + ROWS) for first in range(0, len(weight), ROWS)]
