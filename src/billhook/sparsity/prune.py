"""Prunes a model's weights in one shot: checks, plans while the model stays as it is, applies."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from billhook.arguments import annotated
from billhook.calibration.calibration import Batches, tell_once
from billhook.display import columns
from billhook.engine.comm import ALONE, Comm, Reduce
from billhook.engine.device import check_device
from billhook.engine.lazy import LazyTensors
from billhook.engine.parts import fingerprint
from billhook.engine.passes import in_turn
from billhook.engine.sharding import is_sharded, reshard
from billhook.engine.store import store_of
from billhook.engine.walk import Sequential
from billhook.model.find import check_changeable
from billhook.model.linears import Convolutions, channels, in_place, is_convolution, prunable, size_of, turned
from billhook.model.plan import ModelPlan, Weights, starting_from
from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.checks import (
    adapters_to_count,
    check_called_once,
    check_folder,
    check_matching,
    check_pruning,
    check_sharded,
    check_streamed,
    few_tokens,
    needing,
    needs_data,
    solves,
    tokens_in,
    uncalled,
    warn_of_others,
)
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import check_amount
from billhook.sparsity.matching import BlockMatching, MatchingVisitor
from billhook.sparsity.permute import check_permutable, check_permute, in_order
from billhook.sparsity.pruned import Pruned
from billhook.sparsity.visitor import GlobalPruningVisitor, Progress, PruningVisitor
from billhook.sparsity.walks import Walks, runs_for, sparsities_of


@dataclass(frozen=True, eq=False, repr=False)
class WeightPlan(ModelPlan):
    """Which weights of a model become zero, and the new values of the others where a criterion changes them.

    Attributes:
        kind: `"weights"`.
        model: The name of the model's class; only shown, as it is another one where a model is sharded.
        criterion: The criterion that chose them, in words.
        pattern: `"unstructured"` or `"N:M"`.
        pruned: The results by linear, which lie in memory; of a model that is sharded, in shards of all ranks; of one that is
            streamed and has been pruned, in files until it is saved.
        shapes: Of each linear's weight, `[out_features, in_features]`.
        uncalled: Linears that stay as they are, as no batch has called them.
    """

    kind: ClassVar[str] = "weights"
    model: str
    criterion: str
    pattern: str
    pruned: Mapping[str, Pruned]
    shapes: Mapping[str, tuple[int, ...]]
    uncalled: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of all linears that is removed."""
        total = sum(math.prod(self.shapes[name]) for name in self.pruned)
        return 1 - sum(one.kept for one in self.pruned.values()) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data: a bit for each weight, and the values that change, in base 64.

        If the model was sharded, all ranks call this together.
        """
        pruned = {name: {"shape": list(self.shapes[name]), **one.to_json()} for name, one in self.pruned.items()}
        names = {"kind": self.kind, "model": self.model, "criterion": self.criterion, "pattern": self.pattern}
        uncalled = {name: list(self.shapes[name]) for name in self.uncalled}
        return names | {"pruned": pruned, "uncalled": uncalled}

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            kind, criterion, pattern = (str(plain[name]) for name in ("model", "criterion", "pattern"))
            shapes = {name: tuple(map(int, one["shape"])) for name, one in plain["pruned"].items()}
            pruned = {name: Pruned.from_json(one, math.prod(shapes[name])) for name, one in plain["pruned"].items()}
            uncalled = {name: tuple(map(int, shape)) for name, shape in plain["uncalled"].items()}
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan: it is not as WeightPlan.to_json makes it ({type(error).__name__}: {error})") from error
        plan = cls(kind, criterion, pattern, pruned, shapes | uncalled, tuple(uncalled))
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that lacks one of the linears, or has it in another size."""
        self._linears(model)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the keep-masks, bool, each as its weight lies in memory, and sharded as it is."""
        linears = self._linears(model)
        return {name: turned(linears[name], one.mask(in_place(linears[name]))) for name, one in self.pruned.items()}

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), weights: Weights | None = None) -> None:
        """Changes the weights, in place; what is wrong with plan or model is refused before anything changes.

        After an interrupt, weights of a model in memory may have changed in part: the same call again changes the others. Of a
        model that is streamed, blocks are written one by one, and the checkpoint that they are of stays as it is.

        Args:
            model: The model that the plan was made for, or one with the same linears.
            optimizers: They keep their state: no weight changes its size, and masks are held by others.
            weights: New values of parameters from which pruning starts.

        Raises:
            ValueError: If the plan was not made for this model.
        """
        linears, store, inside = self._linears(model), store_of(model), dict[nn.Module | None, list[str]]()
        for name in reversed(list(self.pruned)):  # linears that an interrupt leaves still have the inputs of before
            inside.setdefault(store.owner.get(linears[name]), []).append(name)

        def put_into(block: nn.Module | None) -> None:
            for name in inside.get(block, ()):
                self.pruned[name].put_into(in_place(linears[name]))

        sizes = {name: tuple(own.shape) for name, own in store.model.named_parameters(remove_duplicate=False)}

        def told() -> str:
            return f"{fingerprint(self.decided())} {LazyTensors.of(weights or {}).key}"

        with starting_from(model, weights) if weights else nullcontext(), store.step(f"{self.kind} {list(self.pruned)}", told):
            for block in store.blocks.values():
                if (block in inside or store.is_altered(block)) and not store.resumed(block, sizes):
                    with store.changing(block):
                        put_into(block)
            store.release()
            put_into(None)

    def decided(self) -> dict[str, str]:
        """Returns a hash of each linear's mask and values, on which ranks have to agree; they ask for it together."""
        return {name: one.decided for name, one in self.pruned.items()}

    def _linears(self, model: nn.Module) -> dict[str, nn.Module]:
        reshard(model)
        linears = prunable(model, output_embeddings=True, convolutions="all")
        found = {name: size_of(linear) for name, linear in linears.items()}
        if wrong := next((name for name in self.pruned if found.get(name) != self.shapes[name]), None):
            raise ValueError(
                f"plan: it was made for another model: {wrong} is {self.shapes[wrong]} there, and {found.get(wrong)} here"
            )
        return linears

    def _shown(self) -> list[RenderableType]:
        """Shows linears that are alike by their name, number, shape, and the least and greatest sparsity."""
        alike: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
        for name, one in self.pruned.items():
            alike[re.sub(r"\b\d+\b", "*", name), self.shapes[name]].append(one.sparsity(math.prod(self.shapes[name])))
        rows = []
        for (name, (out, into)), each in alike.items():
            low, high = min(each), max(each)
            spread = f"{low:.4f}" if high - low < 5e-5 else f"{low:.4f} to {high:.4f}"
            rows.append((name, f"{len(each):>4} x [{out:>6,}, {into:>6,}]  sparsity {spread}"))
        rows += [(name, "not called by any batch: left as it is") for name in self.uncalled]
        return [f"{self.criterion}, {self.pattern}", columns(rows, aligns="<", indent=2)]


def prune(
    model: nn.Module,
    criterion: Criterion | None = None,
    batches: Batches | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    allocation: Allocation | None = None,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
    convolutions: Convolutions = "mixing",
    sequential: Sequential = "block",
    match: BlockMatching | None = None,
    count_adapters: bool = False,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
    offload: str | torch.device | None = None,
    activations: str | None = None,
    permute: bool = False,
    dry_run: bool = False,
) -> WeightPlan:
    """Zeroes the least important weights of a model's linear layers and convolutions, in place and in one shot.

    If a criterion or a run fails, nothing has changed. An interrupt while finished masks are put into a model in memory leaves
    some of its weights as they were: the same call again finishes with the same masks if the criterion is `Magnitude` or `Wanda`
    and neither `allocation`, `match` nor `permute` is given, as zeros score lowest. Modes, random numbers, hooks and configs are
    as before afterwards.

    Args:
        model: A model of transformers, with LoRA attached or not (its base weights are pruned), or any module that the batches
            can be given to.
        criterion: How important a weight is; `Wanda()` by default.
        batches: Calibration data: each batch is what the model's forward takes, as a dictionary, a tuple or a tensor. Padding
            (`attention_mask`, `decoder_attention_mask`) does not count. A `Calibration` reads them; by default they are what a
            language model itself writes.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); None with a pattern N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs; of a convolution, of M channels of a tap.
        allocation: How the sparsity is shared among linears; the same for each by default.
        skip: A glob pattern of linears to leave alone, such as `"*.down_proj"`, or several.
        output_embeddings: Whether the output embedding (`lm_head`) is pruned too, where it is not tied to an embedding, and the
            head of a classifier.
        convolutions: Which `nn.Conv1d` and `nn.Conv2d` are pruned, each as a linear over the patches that its outputs read:
            `"mixing"`, those of which an output reads four channels or more, so not depthwise ones, patch embeddings and stems;
            `"all"`; or `"none"`, as in Wanda's experiments on images.
        sequential: The inputs that a layer's statistics are taken from. `"block"`, the papers': those of the dense block, on the
            outputs of pruned blocks before it. `"layer"`: those of each linear on the outputs of all pruned ones before it, in
            one pass. `"none"`: those of the dense model. All calls of a linear count; one that is called again after its block
            or itself would be pruned (ALBERT's, ProphetNet's), or shares its weight, is pruned first, as with `"none"`.
        match: How what is kept of a block is tuned, once its linears are pruned, so that the block gives what it gave in the
            dense model; by default not at all. Runs go twice then, pruned and dense.
        count_adapters: Whether LoRA counts as if it were merged: a criterion that leaves kept weights as they are then sees
            W + scale B A of the active adapters, in float32. W is pruned, and zeros are pruned first; the adapters stay as they
            are, and `merge` keeps every zero.
        reduce: Sums a tensor over ranks, in place, where each rank has batches of its own.
        progress: Called with how many linears are done, and of how many.
        offload: A device, such as `"cuda"`, on which the blocks of a model in memory or in files compute, one at a time, with
            copies of their parameters, the next block's on their way; the outputs of a block go back to where the model is.
        activations: A folder for the outputs of the model's modules, in files that are removed afterwards; by default memory.
            What else runs hold while they wait for each other, such as masks, stays in memory.
        permute: Whether channels are first put in the order in which groups of N:M lose least, as `permute_for` does.
        dry_run: Whether the model stays as it is; `bh.apply(model, plan)` carries out the plan later.

    Returns:
        The plan, carried out unless `dry_run`; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, the criterion needs data and there is none, a linear
            is quantised or of a width that M does not divide, or weights or statistics hold NaN or inf. With `count_adapters`,
            also if the criterion updates weights, or there is no plain LoRA that is active and not merged; with `match`, if
            all blocks are pruned at once, there are fewer than two batches, or the model calls a block again.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> print(bh.prune(model, bh.Magnitude(), sparsity=0.5, skip=["*.mlp.*", "*.[kvo]_proj"], dry_run=True))
        Magnitude(compares='layer'), unstructured
          model.layers.*.self_attn.q_proj     4 x [   256,    256]  sparsity 0.5000
        >>> round(bh.prune(model, bh.Wanda(), [{"input_ids": torch.arange(64)[None]}], pattern="2:4").sparsity, 2)
        0.5
    """
    annotated(prune, locals())
    criterion, allocation = criterion or Wanda(), allocation or Uniform()
    amount, device, folder = check_amount(sparsity, pattern), check_device(offload), check_folder(activations)
    check_changeable(model)
    comm = Comm.of(reduce, model)
    if permute:
        check_permute(pattern, dry_run, not store_of(model).holds_all, comm is not ALONE)
        check_permutable(model)
    if is_sharded(model):
        check_sharded(criterion, allocation, comm, offload)
    with nullcontext() if dry_run else store_of(model).following():
        with in_turn(model):
            linears = check_pruning(model, criterion, pattern, sequential, allocation, skip, output_embeddings, convolutions)
            if match is not None:
                check_matching(criterion, sequential, count_adapters)
            adapters = adapters_to_count(model, criterion, linears) if count_adapters else {}
            if store_of(model).in_files:
                check_streamed(comm)
            runs = runs_for(model, batches, needing(criterion, allocation, match), comm)
            check_called_once(model, runs)
            walks = Walks(model, linears, runs, comm, device, folder, adapters)
            warn_of_others(model, linears)
            plan = _planned(walks, criterion, amount, pattern, sequential, allocation, match, progress, permute, dry_run)
        if not dry_run:
            plan.apply(model)
    return plan


def _planned(
    walks: Walks,
    criterion: Criterion,
    amount: float,
    pattern: str,
    sequential: Sequential,
    allocation: Allocation,
    match: BlockMatching | None,
    progress: Progress | None,
    permute: bool,
    dry_run: bool,
) -> WeightPlan:
    model, linears, shapes = walks.model, walks.linears, {name: size_of(linear) for name, linear in walks.linears.items()}
    known = tokens_in(walks.runs, walks.comm) if solves(criterion) else None
    coming = {} if known is None else {n: (known, channels(one)) for n, one in linears.items() if not is_convolution(one)}
    if words := few_tokens(criterion, coming):
        tell_once(words)
    with in_order(walks, criterion, pattern) if permute else nullcontext():
        sparsities = sparsities_of(walks, amount, allocation)
        key = None if dry_run else f"{criterion} {pattern} {sequential} {sparsities}" + (f" {match}" if match else "")
        make = partial(_kind(criterion, match), criterion, sparsities, pattern, progress)
        visitor = walks(sequential if needs_data(criterion) or match else None, make, key)
        pruned = {name: visitor.pruned[name] for name in linears if name in visitor.pruned}
        left_out = uncalled(linears, pruned)
    fewer = {name: own for name, own in visitor.given.items() if name not in coming or own[0] < coming[name][0]}
    if words := few_tokens(criterion, fewer):  # of experts, which are given only some of the tokens
        tell_once(words)
    return WeightPlan(type(model).__name__, str(criterion), pattern, pruned, shapes, left_out)


def _kind(criterion: Criterion, match: BlockMatching | None) -> Callable[..., PruningVisitor]:
    """Returns what makes the visitor."""
    if match is not None:
        return partial(MatchingVisitor, match)
    return GlobalPruningVisitor if criterion.compares == "global" else PruningVisitor
