"""Repairs mixtures of experts that lose experts or channels, block by block.

A router sends each token to a few experts, and a mixture outputs y(x) = sum over e of g_e(x) W_e h_e(x), with the gate g_e,
hidden activations h_e, and output matrix W_e of expert e. Without some units, a block is short of its dense output by r(x).
Experts are refitted one after the other, each to what is still missing: W_e' = W_e + M, where M minimizes the sum over the tokens
of |r(x) - g_e(x) M h_e(x)|^2 plus a ridge penalty. An expert with few tokens therefore stays near its old matrix.

Each batch runs twice, block by block: through the dense model, and through blocks without the units. Routers then choose among
the experts that are left.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
    call_with_copies,
    evaluating_without_grad,
    overridden,
)
from billhook.linalg import Indices
from billhook.model import ExpertLinear, attention_for_all_dtypes, expert_layers, matrix_of, sparse_support, stacks_of
from billhook.progress import OnProgress
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.removal import selected, try_removal
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.matching import (
    LEAST_STEPS,
    REPAIRED_LR,
    BlockOutputs,
    BlockSample,
    BlockTuning,
    block_mask,
    check_enough_batches,
    hidden_state,
)
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, ResidualStatistics, as_float

Routed = tuple[int, Tensor, Tensor, Tensor]
"""A call of an expert: run, tokens, gates, `[tokens]`, and hidden activations, `[tokens, in_features]`."""
Calls = dict[int, tuple[BlockSample, Tensor]]
"""Calls of a block by run, with its outputs without the units."""


def repair_experts(
    model: PreTrainedModel,
    cut: Cut,
    runs: Sequence[Run],
    repair: RepairConfig,
    comm: Comm,
    values: LazyTensors,
    progress: OnProgress | None,
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
    experts, why = [module for module in model.modules() if stacks_of(module)], ""
    if len({module.get_parameter("down_proj") for module in experts}) < len(experts):
        why = "uses the same experts in several blocks, so they cannot be refitted for each"
    elif any(getattr(module, "has_post_expert_norm", False) for module in experts):
        why = "has a norm after each expert, so its outputs are not linear in the weights"
    elif not blocks_of(model):
        why = "has no blocks"
    if why:
        raise NoRepair(f"repair: {type(model).__name__} {why}.")
    check_enough_batches(repair.match, len(runs), comm)
    with evaluating_without_grad(model), attention_for_all_dtypes(model):
        visitor = _ExpertVisitor(model, cut, runs, repair, comm, values, progress)
        visitor.run()
    return LazyTensors.of(visitor.new)


@dataclass(eq=False)
class _ExpertVisitor(Visitor):
    """Refits the experts of each block that all runs have left.

    The second half of the runs is dense.
    """

    model: PreTrainedModel
    cut: Cut
    runs: Sequence[Run]
    repair: RepairConfig
    comm: Comm
    values: LazyTensors
    progress: OnProgress | None

    def __post_init__(self) -> None:
        cut = self.cut
        if widths := [name for name in cut.units if cut.kinds[name] in ("residual", "token")]:  # blocks could not be compared
            units = {name: numbers for name, numbers in cut.units.items() if name not in widths}
            cut = find_cut(self.model, cut.structure, cut.all_units, units, by_expert=cut.by_expert)
        self._pruned = try_removal(self.model, cut)  # on the meta device; a block has values while runs are in it
        self._parts = self.repair.parts(len(self.runs), self.comm)
        self.untouched = range(len(self.runs), 2 * len(self.runs))
        self._kept = defaultdict[str, dict[int, Indices]](dict)
        for (name, dim), positions in cut.cuts.items():
            self._kept[name][dim] = positions
        inside = set(blocks_of(self.model))
        self._blocks = {name: block for name, block in self.model.named_modules() if block in inside}
        self._walk = Walk([Site(block, {name: block}, out=True) for name, block in self._blocks.items()], self, self.comm)
        self._done, self._observes = set[str](), False
        self._routed = defaultdict[str, list[Routed]](list)  # by output matrix of an expert
        self._mixtures = defaultdict[str, dict[int, Tensor]](dict)  # outputs by mixture and run
        self._outputs = BlockOutputs()
        self.new = dict[str, Tensor]()

    def run(self) -> None:
        """Runs all batches through all blocks."""
        with expert_layers(self._pruned), ExitStack() as stack:
            for name, block in self._blocks.items():
                stack.enter_context(overridden(block, forward=partial(self._forward, name, block.forward)))
            for name, module in chain(self.model.named_modules(), self._pruned.named_modules()):
                if stacks_of(module):
                    stack.callback(module.register_forward_hook(partial(self._on_mixture, name)).remove)
                elif isinstance(module, ExpertLinear) and module.stack == "down_proj":
                    stack.callback(module.register_forward_pre_hook(partial(self._on_expert, name)).remove)
            self._walk([run.visit for run in (*self.runs, *self.runs)])

    def _forward(self, name: str, dense: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of a block
        """Runs a dense block, or the block without the units."""
        self._observes = name not in self._done
        if self._walk.run in self.untouched:
            return dense(*args, **kwargs)
        pruned = self._pruned.get_submodule(name)
        if any(parameter.is_meta for parameter in pruned.parameters()):
            for part, tensor in [*self._blocks[name].named_parameters(), *self._blocks[name].named_buffers()]:
                value, (owner, _, attribute) = self._selected(f"{name}.{part}", tensor), part.rpartition(".")
                holder = pruned.get_submodule(owner)
                if attribute in holder._buffers:
                    holder._buffers[attribute] = value
                else:
                    holder._parameters[attribute] = nn.Parameter(value.to(tensor.device, copy=True), requires_grad=False)
        return pruned(*args, **kwargs)

    def _selected(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what is left of a tensor of the model, or of its new values."""
        return selected(self.values.get(name, tensor.detach()), self._kept[name])

    def _on_mixture(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if self._observes:
            self._mixtures[name][self._walk.run] = output

    def _on_expert(self, name: str, layer: ExpertLinear, args: tuple[Tensor, ...]) -> None:
        if self._observes:
            self._routed[name].append((self._walk.run, layer.tokens, layer.gates, args[0]))

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Records the arguments and output of a block."""
        self._outputs.add(run, arguments, output)

    def on_reentry(self, site: Site) -> None:
        """Raises if a block is called again."""
        raise NoRepair(f"repair: {next(iter(site.linears))} is called several times in a run, so its experts cannot be refitted.")

    def complete(self, site: Site) -> None:
        """Refits the experts of the block that all runs have left, and tunes the block."""
        (name,) = site.linears
        self._done.add(name)
        self._observes = False
        block, first, calls = self._pruned.get_submodule(name), len(self.runs), Calls()
        for run, inputs, output, goal in self._outputs.take(first):
            batch = self.runs[run]
            calls[run] = BlockSample(inputs, goal, block_mask(batch, name, goal), batch.source), output
        mixtures = {full: module for full, module in block.named_modules(prefix=name) if stacks_of(module)}
        for full, mixture in mixtures.items():
            outputs, missing = self._mixtures[full], {}  # by run, `[tokens, hidden_size]`
            for run in calls:
                if run in outputs and run + first in outputs:
                    missing[run] = (as_float(outputs[run + first]) - as_float(outputs[run])).flatten(0, -2)
            if self.repair.compensate and len(mixtures) == 1 and self._is_added(block, mixture, missing, calls):
                for run, residual in missing.items():
                    sample, output = calls[run]
                    missing[run] = (as_float(sample.goal) - as_float(output)).view(residual.shape)
            self._refit(full, mixture, missing, calls)
        if (matching := self.repair.match) is not None:
            parameters = {part: value.detach() for part, value in block.named_parameters() if value.is_floating_point()}
            keeps = {part: value != 0 for part, value in parameters.items()}
            matching = replace(matching, lr=matching.lr or REPAIRED_LR)
            with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
                tuning = BlockTuning(matching, block, parameters, keeps, self.comm, least_steps=LEAST_STEPS)
                tuned = tuning(*matching.split([sample for sample, _ in calls.values()]))
            for part, value in tuned.items():
                parameters[part].copy_(value)
        self._mixtures.clear()
        self._routed.clear()
        if self.progress is not None:
            self.progress(len(self._done), len(self._blocks))

    def leave(self, site: Site) -> None:
        """Records the new parameters of a block that all runs have passed, and frees it."""
        (name,) = site.linears
        block = self._pruned.get_submodule(name)
        for full, parameter in block.named_parameters(prefix=name):
            old = self.model.get_parameter(full).detach()
            if not torch.equal(self._selected(full, old), parameter):
                # the numbers of the kept entries, by the same selection
                kept = selected(torch.arange(old.numel(), device=old.device).view(old.shape), self._kept[full])
                self.new[full] = torch.zeros_like(old).flatten().scatter_(0, kept.flatten(), parameter.flatten()).view(old.shape)
        block.to("meta")

    def _refit(self, name: str, mixture: nn.Module, missing: dict[int, Tensor], calls: Calls) -> None:
        """Refits the output matrices of a mixture, one expert after the other."""
        for number in range(len(mixture.get_parameter("down_proj"))):
            weight, bias = matrix_of(mixture.get_submodule(f"{number}.down_proj"))  # views of the parameters
            parts = [ResidualStatistics(len(weight), weight.shape[1], weight.device) for _ in range(2)]
            routed = self._routed[f"{name}.{number}.down_proj"]
            for run, tokens, gates, hidden in routed:
                # |r - g M h|^2 = g^2 |r / g - M h|^2
                gates, keep = as_float(gates), calls[run][0].counts
                residual = missing[run][tokens] / torch.where(gates == 0, 1, gates)[:, None]
                weights = gates.square()
                if keep is not None and keep.numel() == len(missing[run]):
                    weights = weights * keep.flatten()[tokens]
                parts[self._parts[run]].add(hidden, residual, weights=weights)
            self.comm.sum_(*(sums for part in parts for sums in part.tensors()))
            if not all(torch.stack([part.tokens for part in parts]).tolist()):
                continue
            new, new_bias = refit_linear(weight, bias, parts, self.repair.ridges, self.comm, sparse_support(weight))
            change = as_float(new) - as_float(weight)
            shift = 0 if bias is None or new_bias is None else as_float(new_bias.to(bias)) - as_float(bias)
            for run, tokens, gates, hidden in routed:
                added = (as_float(hidden) @ change.t() + shift) * as_float(gates)[:, None]
                missing[run].index_add_(0, tokens, added, alpha=-1)
            weight.copy_(new)
            if bias is not None and new_bias is not None:
                bias.copy_(new_bias)

    def _is_added(self, block: nn.Module, mixture: nn.Module, missing: Mapping[int, Tensor], calls: Calls) -> bool:
        """Returns whether a block adds the mixture's outputs to its own, unchanged."""
        run = min(missing, default=None)
        differs = torch.zeros(1, device=self.comm.device)
        if run is not None:
            sample, output = calls[run]
            scale = as_float(output).norm() / missing[run].norm().clamp(min=1e-20)  # so that rounding does not hide it
            extra = (missing[run] * scale).to(output.dtype)
            hook = mixture.register_forward_hook(lambda _, __, outputs: outputs + extra.view(outputs.shape))
            changed = hidden_state(call_with_copies(block, *sample.inputs))
            hook.remove()
            assert changed is not None, "it has come out before"
            difference = as_float(changed) - as_float(output) - as_float(extra).view(output.shape)
            differs += difference.norm() > 0.05 * as_float(extra).norm()
        return not self.comm(differs).item()
