"""Repairs mixtures of experts that lose experts or channels, block by block.

A router sends each token to a few experts, and a mixture outputs y(x) = sum over e of g_e(x) W_e h_e(x), with the gate g_e,
hidden activations h_e, and output matrix W_e of expert e. Without some units, a block is short of its dense output by r(x).
Experts are refitted one after the other, each to what is still missing: W_e' = W_e + M, where M minimizes the sum over the tokens
of |r(x) - g_e(x) M h_e(x)|^2 plus a ridge penalty. An expert with few tokens therefore stays near its old matrix.

Each batch runs twice, block by block: through the dense model, and through blocks without the units. Routers then choose among
the experts that are left.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import (
    Arguments,
    Comm,
    LazyTensors,
    Run,
    Site,
    Visitor,
    Walk,
    blocks_of,
    copy_cache,
    evaluating_without_grad,
    overridden,
)
from billhook.linalg import Indices
from billhook.model import ExpertLinear, attention_for_all_dtypes, expert_layers, is_pruned, stacks_of
from billhook.progress import OnProgress
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.removal import selected, try_removal
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.matching import (
    LEAST_STEPS,
    REPAIRED_LR,
    BlockMatching,
    BlockSample,
    BlockTuning,
    block_mask,
    hidden_state,
    too_few_batches,
)
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, ResidualStatistics, as_float

Routed = tuple[int, Tensor, Tensor, Tensor]
"""A call of an expert: run, tokens, gates, `[tokens]`, and hidden activations, `[tokens, in_features]`."""


def repair_experts(
    model: PreTrainedModel,
    cut: Cut,
    runs: Sequence[Run],
    repair: RepairConfig,
    comm: Comm,
    values: LazyTensors,
    progress: OnProgress | None = None,
) -> LazyTensors:
    """Returns new parameters of blocks whose experts are refitted without some units.

    Next to the model, memory holds one block without the units, and its outputs and the hidden activations of its experts for all
    batches.

    Args:
        model: The dense model, in memory. It does not change.
        cut: Units to remove.
        runs: The batches, at least two over all ranks, of which some choose the ridge penalties.
        repair: Repair settings. With `compensate`, experts also compensate for the errors of earlier layers, if a block adds
            their output to the residual stream. With `match`, all parameters of each block are then tuned.
        comm: The ranks, each with its own batches.
        values: New parameters of other layers, without adapters.
        progress: Callback with the number of completed blocks and the total.

    Raises:
        NoRepair: If the model has no blocks or calls them twice, or its experts have a norm or are tied.
    """
    stacks = [module.get_parameter("down_proj") for module in model.modules() if stacks_of(module)]
    if len(set(stacks)) < len(stacks):
        raise NoRepair(
            f"repair: {type(model).__name__} uses the same experts in several blocks, so they cannot be refitted for each."
        )
    if any(getattr(module, "has_post_expert_norm", False) for module in model.modules()):
        raise NoRepair(
            f"repair: {type(model).__name__} has a norm after each expert, so its outputs are not linear in the weights."
        )
    if repair.match is not None and any(count < 2 for count in comm.gather(len(runs))):
        raise too_few_batches(len(runs), comm)
    with evaluating_without_grad(model), attention_for_all_dtypes(model):
        visitor = _ExpertVisitor(model, cut, runs, repair, comm, values, progress)
        if not visitor.blocks:
            raise NoRepair(f"repair: {type(model).__name__} has no blocks.")
        visitor.run()
    return LazyTensors.of(visitor.new)


class _ExpertVisitor(Visitor):
    """Refits the experts of each block that all runs have left. The second half of the runs is dense."""

    def __init__(
        self,
        model: PreTrainedModel,
        cut: Cut,
        runs: Sequence[Run],
        repair: RepairConfig,
        comm: Comm,
        values: LazyTensors,
        progress: OnProgress | None,
    ) -> None:
        if widths := [name for name in cut.units if cut.kinds[name] in ("residual", "token")]:  # blocks could not be compared
            units = {name: numbers for name, numbers in cut.units.items() if name not in widths}
            cut = find_cut(model, cut.structure, cut.all_units, units, by_expert=cut.by_expert)
        self._model, self._pruned = model, try_removal(model, cut)  # on the meta device; a block has values while runs are in it
        self._runs, self._repair, self._comm, self._values, self._progress = runs, repair, comm, values, progress
        self._parts = repair.parts(len(runs), comm)
        self.untouched = range(len(runs), 2 * len(runs))
        self._kept = defaultdict[str, dict[int, Indices]](dict)
        for (name, dim), positions in cut.cuts.items():
            self._kept[name][dim] = positions
        inside = set(blocks_of(model))
        self.blocks = {name: block for name, block in model.named_modules() if block in inside}
        self._walk = Walk([Site(block, {name: block}, out=True) for name, block in self.blocks.items()], self, comm)
        self._filled, self._done, self._observes = set[str](), set[str](), False
        self._routed = defaultdict[str, list[Routed]](list)  # by output matrix of an expert
        self._mixtures = defaultdict[str, dict[int, Tensor]](dict)  # outputs by mixture and run
        self._outputs = dict[int, tuple[Arguments, Tensor]]()  # of the block, by run
        self.new = dict[str, Tensor]()

    def run(self) -> None:
        """Runs all batches through all blocks."""
        with expert_layers(self._pruned), ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.enter_context(overridden(block, forward=partial(self._forward, name, block.forward)))
            for name, module in chain(self._model.named_modules(), self._pruned.named_modules()):
                if stacks_of(module):
                    stack.callback(module.register_forward_hook(partial(self._on_mixture, name)).remove)
                elif isinstance(module, ExpertLinear) and module.stack == "down_proj":
                    stack.callback(module.register_forward_pre_hook(partial(self._on_expert, name)).remove)
            self._walk([run.visit for run in (*self._runs, *self._runs)])

    def _forward(self, name: str, dense: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of a block
        """Runs a dense block, or the block without the units."""
        self._observes = name not in self._done
        if self._walk.run in self.untouched:
            return dense(*args, **kwargs)
        pruned = self._pruned.get_submodule(name)
        if name not in self._filled:
            self._filled.add(name)
            for part, tensor in [*self.blocks[name].named_parameters(), *self.blocks[name].named_buffers()]:
                full, (owner, _, attribute) = f"{name}.{part}", part.rpartition(".")
                value = selected(self._values.get(full, tensor.detach()), self._kept[full])
                holder = pruned.get_submodule(owner)
                if attribute in holder._buffers:
                    holder._buffers[attribute] = value
                else:
                    holder._parameters[attribute] = nn.Parameter(value.to(tensor.device, copy=True), requires_grad=False)
        return pruned(*args, **kwargs)

    def _on_mixture(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if self._observes:
            self._mixtures[name][self._walk.run] = output.detach()

    def _on_expert(self, name: str, layer: ExpertLinear, args: tuple[Tensor, ...]) -> None:
        if self._observes:
            self._routed[name].append((self._walk.run, layer.tokens, layer.gates, args[0].detach()))

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Records the arguments and output of a block."""
        if (state := hidden_state(output)) is not None:
            self._outputs[run] = arguments, state.detach()

    def on_reentry(self, site: Site) -> None:
        """Raises if a block is called again."""
        raise NoRepair(f"repair: {next(iter(site.linears))} is called several times in a run, so its experts cannot be refitted.")

    def complete(self, site: Site) -> None:
        """Refits the experts of the block that all runs have left, and tunes the block."""
        name = next(iter(site.linears))
        self._done.add(name)
        self._observes = False
        mixtures = [module for module in self._pruned.get_submodule(name).modules() if stacks_of(module)]
        for mixture in mixtures:
            self._refit(name, mixture, self._repair.compensate and len(mixtures) == 1)
        if (matching := self._repair.match) is not None:
            self._tune(name, replace(matching, lr=matching.lr or REPAIRED_LR))
        self._mixtures.clear()
        self._routed.clear()
        self._outputs.clear()
        if self._progress is not None:
            self._progress(len(self._done), len(self.blocks))

    def leave(self, site: Site) -> None:
        """Records the new parameters of a block that all runs have passed, and frees it."""
        (name,) = site.linears
        for part, parameter in list(self._pruned.get_submodule(name).named_parameters()):
            full, (owner, _, attribute) = f"{name}.{part}", part.rpartition(".")
            old = self._model.get_parameter(full).detach()
            if not torch.equal(selected(self._values.get(full, old), self._kept[full]), parameter):
                # the numbers of the kept entries, by the same selection
                kept = selected(torch.arange(old.numel(), device=old.device).view(old.shape), self._kept[full])
                self.new[full] = torch.zeros_like(old).flatten().scatter_(0, kept.flatten(), parameter.flatten()).view(old.shape)
            self._pruned.get_submodule(f"{name}.{owner}".rstrip("."))._parameters[attribute] = nn.Parameter(
                parameter.to("meta"), requires_grad=False
            )

    def _refit(self, block: str, mixture: nn.Module, compensate: bool) -> None:
        """Refits the output matrices of a mixture, one expert after the other."""
        name = next(name for name, module in self._pruned.named_modules() if module is mixture)
        missing, first, outputs = dict[int, Tensor](), len(self._runs), self._mixtures[name]
        for run in range(first):
            if run in outputs and run + first in outputs:
                missing[run] = (as_float(outputs[run + first]) - as_float(outputs[run])).flatten(0, -2)
        if compensate and self._is_added(block, mixture, missing):
            for run, residual in missing.items():
                goal, output = (as_float(self._outputs[number][1]) for number in (run + first, run))
                missing[run] = (goal - output).view(residual.shape)
        for number in range(len(mixture.get_parameter("down_proj"))):
            layer = mixture.get_submodule(f"{number}.down_proj")
            assert isinstance(layer, ExpertLinear), "as of `expert_layers`"
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            parts = [ResidualStatistics(len(weight), weight.shape[1], weight.device) for _ in range(2)]
            calls = self._routed[f"{name}.{number}.down_proj"]
            for run, tokens, gates, hidden in calls:
                # |r - g M h|^2 = g^2 |r / g - M h|^2
                gates, keep = as_float(gates), block_mask(self._runs[run], block, self._outputs[run][1])
                residual = missing[run][tokens] / torch.where(gates == 0, 1, gates)[:, None]
                weights = gates.square()
                if keep is not None and keep.numel() == len(missing[run]):
                    weights = weights * keep.flatten()[tokens]
                parts[self._parts[run]].add(hidden, residual, weights=weights)
            self._comm.sum_(*(sums for part in parts for sums in part.tensors()))
            if not all(torch.stack([part.tokens for part in parts]).tolist()):
                continue
            support = weight != 0
            is_sparse = is_pruned(int((~support).sum()), support.numel())  # else single zeros need not stay
            new, new_bias = refit_linear(weight, bias, parts, self._repair.ridges, self._comm, support if is_sparse else None)
            change = as_float(new) - as_float(weight)
            shift = 0 if bias is None or new_bias is None else as_float(new_bias.to(bias)) - as_float(bias)
            for run, tokens, gates, hidden in calls:
                added = (as_float(hidden) @ change.t() + shift) * as_float(gates)[:, None]
                missing[run].index_add_(0, tokens, added, alpha=-1)
            layer.of_stack(mixture.get_parameter("down_proj").detach()).copy_(new)
            if new_bias is not None:
                mixture.get_parameter("down_proj_bias").detach()[number].copy_(new_bias)

    def _is_added(self, block: str, mixture: nn.Module, missing: dict[int, Tensor]) -> bool:
        """Returns whether a block adds the mixture's outputs to its own, unchanged."""
        run = min(missing, default=None)
        differs = torch.zeros(1, device=self._comm.device)
        if run is not None:
            (args, kwargs), output = self._outputs[run]
            scale = as_float(output).norm() / missing[run].norm().clamp(min=1e-20)  # so that rounding does not hide it
            extra = (missing[run] * scale).to(output.dtype)
            hook = mixture.register_forward_hook(lambda _, __, outputs: outputs + extra.view(outputs.shape))
            kwargs = {name: copy_cache(value) for name, value in kwargs.items()}
            changed = hidden_state(self._pruned.get_submodule(block)(*map(copy_cache, args), **kwargs))
            hook.remove()
            assert changed is not None, "it has come out before"
            difference = as_float(changed) - as_float(output) - as_float(extra).view(output.shape)
            differs += difference.norm() > 0.05 * as_float(extra).norm()
        return not self._comm(differs).item()

    def _tune(self, name: str, matching: BlockMatching) -> None:
        """Tunes all parameters of a block to reproduce the dense block's outputs."""
        block, samples = self._pruned.get_submodule(name), list[BlockSample]()
        for run, batch in enumerate(self._runs):
            if run not in self._outputs or run + len(self._runs) not in self._outputs:
                continue
            (inputs, _), (_, goal) = self._outputs[run], self._outputs[run + len(self._runs)]
            samples.append(BlockSample(inputs, goal, block_mask(batch, name, goal), batch.source))
        parameters = {name: parameter.detach() for name, parameter in block.named_parameters() if parameter.is_floating_point()}
        keeps = {name: value != 0 for name, value in parameters.items()}
        with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
            tuning = BlockTuning(matching, block, parameters, keeps, self._comm, least_steps=LEAST_STEPS)
            tuned = tuning(*matching.split(samples))
        for name, value in tuned.items():
            parameters[name].copy_(value)
