"""One-shot weight pruning: checks, plans without changing the model, and applies."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, log_once
from billhook.engine import Arguments, Comm, Reduce, Site, blockwise, check_device, cpu_by_default, is_sharded, store_of
from billhook.model import (
    ExpertLinear,
    attention_for_all_dtypes,
    check_called_once,
    check_changeable,
    expert_layers,
    holder_of,
    size_of,
    view_in,
    weight_of,
    weight_view,
)
from billhook.progress import OnProgress
from billhook.repairs.matching import (
    BlockMatching,
    BlockOutputs,
    BlockSample,
    BlockTuning,
    raise_block_called_again,
)
from billhook.sparsity.allocation import allocate_sparsities
from billhook.sparsity.checks import (
    check_called,
    check_folder,
    check_matching,
    check_pruning,
    check_sharded,
    check_streamed,
    expected_tokens,
    make_runs,
    needs_data,
    too_few_tokens,
    unsupported_weights,
    warn_of_unsupported_weights,
)
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import FEWEST, check_amount
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.visitor import GlobalPruningVisitor, PruningVisitor, WalkSettings
from billhook.sparsity.weight_plan import PrunedLayer, WeightPlan


@cpu_by_default()
def prune(
    model: nn.Module,
    criterion: Criterion | None = None,
    batches: Batches | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    options: PruneOptions | None = None,
    reduce: Reduce | None = None,
    progress: OnProgress | None = None,
    offload: str | torch.device | None = None,
    activations: str | None = None,
    dry_run: bool = False,
) -> WeightPlan:
    """Prunes the weights of linear layers and convolutions, in place and without training.

    If a criterion or a run fails, the model is unchanged. If an interrupt stops `prune` while it applies masks to a model in
    memory, some weights keep their old values. The same call then finishes with the same masks, if the criterion is `Magnitude`
    or `Wanda` and neither `allocation` nor `match` is set, because zeros score lowest. Modes, random state, hooks,
    and configs are restored.

    Args:
        model: A Hugging Face model, also with LoRA attached (its base weights are pruned), or any module that accepts the
            batches.
        criterion: Scores the weights. Defaults to `Wanda()`.
        batches: Calibration data: batches (dictionaries, tuples, or tensors of forward inputs) or a `Calibration`. Padding
            (`attention_mask`, `decoder_attention_mask`) is ignored. Defaults to `"mixed"` and `"generated"` text for language
            models.
        sparsity: Fraction of each linear layer's weights to zero, in [0, 1). None with an N:M pattern.
        pattern: `"unstructured"`, or `"N:M"` to keep N of every M consecutive inputs; in a convolution, of M channels at a
            kernel position.
        options: Further options, such as `PruneOptions(sequential="layer")`.
        reduce: Sums a statistic over ranks, in place. Required if each rank has its own batches.
        progress: Callback with the number of pruned layers and the total.
        offload: Device such as `"cuda"` on which blocks run one at a time, with copies of their parameters; the next block is
            copied meanwhile, and outputs return to the model's device. Defaults to None (off).
        activations: Folder for temporary files with module outputs, for a model on the CPU. Defaults to None (memory). Other
            state of waiting runs, such as attention masks, stays in memory.
        dry_run: If True, the model stays unchanged. Apply the plan later with `bh.apply(model, plan)`.

    Returns:
        The plan, applied unless `dry_run`; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, two cannot be combined, the criterion needs data and there is none, a layer is
            quantized or M does not divide its width, or weights or statistics contain NaN or inf. With `match`, also if all
            blocks are pruned at once, there are fewer than two batches, or the model calls a block twice.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> options = bh.PruneOptions(skip=["*.mlp.*", "*.[kvo]_proj"])
        >>> print(bh.prune(model, bh.Magnitude(), sparsity=0.5, options=options, dry_run=True))
        Magnitude(compares='layer'), unstructured
          model.layers.*.self_attn.q_proj     4 x [   256,    256]  sparsity 0.5000
        >>> round(bh.prune(model, bh.Wanda(), [{"input_ids": torch.arange(64)[None]}], pattern="2:4").sparsity, 2)
        0.5
    """
    check_types(prune, locals())
    criterion, options = criterion or Wanda(), options or PruneOptions()
    allocation, match = options.allocation, options.match
    amount, device, folder = check_amount(sparsity, pattern), check_device(offload), check_folder(activations, model)
    check_changeable(model)
    store_of(model).check_writes_values()
    comm = Comm.of(reduce, model)  # communicates, so it comes after the checks that each rank makes alone
    if is_sharded(model):
        check_sharded(model, criterion, options, comm, offload)
    check_streamed(model, comm)
    with nullcontext() if dry_run else store_of(model).restored_on_error():
        # blocks are tuned in float32, with the masks that runs make
        with blockwise(model), expert_layers(model), nullcontext() if match is None else attention_for_all_dtypes(model):
            linears = check_pruning(model, criterion, pattern, options)
            if match is not None:
                check_matching(criterion, options.sequential)
            runs = make_runs(model, batches, comm, criterion, options)
            check_called_once(model, runs)
            unsupported = unsupported_weights(model, linears)
            warn_of_unsupported_weights(unsupported)
            others = {name: linear for name, linear in linears.items() if not isinstance(linear, ExpertLinear)}
            expected = expected_tokens(criterion, others, runs, comm)
            if message := too_few_tokens(criterion, expected):  # before the work, if the number is known
                log_once(message)
            settings = WalkSettings(model, linears, runs, comm, device, folder)
            sparsities = dict.fromkeys(linears, amount)
            if allocation is not None:
                sparsities = allocate_sparsities(settings, amount, allocation)
            key = f"{criterion} {pattern} {options.sequential} {sparsities}" + (f" {match}" if match else "")
            make_visitor: Callable[..., PruningVisitor] = PruningVisitor
            if match is not None:
                make_visitor = partial(MatchingVisitor, match)
            elif criterion.compares == "global":
                make_visitor = GlobalPruningVisitor
            visitor = settings.walk(
                options.sequential if needs_data(criterion) or match else None,
                partial(make_visitor, criterion, sparsities, pattern, progress),
                None if dry_run else key,
            )
            pruned = {name: visitor.pruned[name] for name in linears if name in visitor.pruned}
            without_tokens = {name for name, tokens in visitor.by_magnitude.items() if not tokens}
            left_out = check_called(linears, pruned if pruned.keys() - without_tokens else ())
            # experts get only some of the tokens
            fewer = {name: seen for name, seen in visitor.tokens.items() if name not in expected or seen[0] < expected[name][0]}
            if message := too_few_tokens(criterion, fewer):
                log_once(message)
            if by_magnitude := visitor.by_magnitude:
                name, tokens = min(by_magnitude.items(), key=lambda item: item[1])
                log_once(
                    f"{len(by_magnitude)} matrices of experts received fewer than {FEWEST} calibration tokens, such as {name} "
                    f"({tokens}), and are pruned by magnitude. Use more tokens."
                )
        shapes = {name: size_of(linear) for name, linear in linears.items()}
        plan = WeightPlan(type(model).__name__, str(criterion), pattern, pruned, shapes, left_out, unsupported, by_magnitude)
        if not dry_run:
            plan.apply(model)
    return plan


class MatchingVisitor(PruningVisitor):
    """A visitor that runs each batch twice, pruned and dense, and reconstructs blocks.

    Args:
        matching: Settings of block-wise reconstruction.
        args: Arguments of `PruningVisitor`.
    """

    def __init__(self, matching: BlockMatching, *args: Any) -> None:  # noqa: ANN401 - the arguments of `PruningVisitor`
        super().__init__(*args)
        self.matching, self._batches = matching, len(self.settings.runs)
        self.dense = range(self._batches, 2 * self._batches)
        self._outputs = BlockOutputs()
        if self.settings.tied:  # the weight would be pruned before its second use
            raise_block_called_again(self.settings.tied[0][0])

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Records the input and output of a block."""
        self._outputs.add(run, arguments, output)

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
        samples = []
        for run, inputs, _, goal in self._outputs.take(self._batches):
            samples.append(
                BlockSample(inputs, goal, self._counting(goal.shape[:-1], goal, run, site.module), self.settings.runs[run].source)
            )
        if not linears:
            return
        # each rank needs samples to tune on and samples to hold out
        if self.comm(torch.tensor([float(len(samples) < 2)], device=weight_of(next(iter(linears.values()))).device)):
            return
        names = {id(parameter): name for name, parameter in site.module.named_parameters()}
        weights, keeps, parameters = {}, {}, {}
        for name, linear in linears.items():
            stored, old, pruned = getattr(*holder_of(linear)), weight_view(linear), self.pruned[name]
            key = parameters[name] = names[id(stored)]
            if key not in weights:
                weights[key], keeps[key] = stored.detach().clone(), torch.ones_like(stored, dtype=torch.bool)
            view_in(linear, weights[key]).copy_(pruned.weight(old))
            view_in(linear, keeps[key]).copy_(pruned.keep(old))
        with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
            tuning = BlockTuning(self.matching, site.module, weights, keeps, self.comm)
            weights.clear()  # copied by BlockTuning
            tuned = tuning(*self.matching.split(samples))
        for name, linear in linears.items():  # rounded to the dtype of the old weights
            old, new = weight_of(linear), view_in(linear, tuned[parameters[name]]).flatten(1)
            self.pruned[name] = PrunedLayer.of(old, new.to(old.dtype), self.pruned[name].keep(old))
