"""Block-wise reconstruction of pruned weights, a block at a time while `prune` walks."""

from typing import Any

import torch
from torch import Tensor

from billhook.engine.walk import Arguments, Site
from billhook.model.layers import is_convolution, to_layout, weight_of
from billhook.repairs.matching import BlockMatching, BlockSample, BlockTuning, hidden_state, raise_block_called_again
from billhook.sparsity.visitor import PruningVisitor
from billhook.sparsity.weight_plan import PrunedLayer


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
        self._outputs: dict[int, tuple[Arguments, Tensor]] = {}  # by run
        if self.settings.tied:  # the weight would be pruned before its second use
            raise_block_called_again(self.settings.tied[0][0])

    def on_exit(self, run: int, arguments: Arguments, output: object) -> None:
        """Records the input and output of a block."""
        if (state := hidden_state(output)) is not None:
            self._outputs[run] = arguments, state

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
        samples, outputs = list[BlockSample](), self._outputs
        self._outputs = {}
        for run in range(self._batches):
            if run in outputs and (dense := run + self._batches) in outputs:
                (inputs, output), (_, goal) = outputs[run], outputs[dense]
                if output.shape == goal.shape:
                    counts = self._counting(goal.shape[:-1], goal, run)
                    samples.append(BlockSample(inputs, goal, counts, self.settings.runs[run].source))
        if not linears:
            return
        # each rank needs samples to tune on and samples to hold out
        if self.comm(torch.tensor([float(len(samples) < 2)], device=weight_of(next(iter(linears.values()))).device)):
            return
        names = {id(parameter): name for name, parameter in site.module.named_parameters()}
        parameters = {name: names[id(linear.get_parameter("weight"))] for name, linear in linears.items()}
        weights, keeps = dict[str, Tensor](), dict[str, Tensor]()
        for name, linear in linears.items():
            weights[parameters[name]] = to_layout(linear, self.pruned[name].weight(weight_of(linear)))
            keeps[parameters[name]] = to_layout(linear, self.pruned[name].keep(weight_of(linear)))
        parts: tuple[list[BlockSample], list[BlockSample]] = ([], [])
        for sample, is_held_out in zip(samples, self.matching.is_held_out([each.source for each in samples]), strict=True):
            parts[is_held_out].append(sample)
        with torch.inference_mode(False):  # tensors made in inference mode cannot have gradients
            tuning = BlockTuning(self.matching, site.module, weights, keeps, self.comm)
            weights.clear()  # copied by BlockTuning
            tuned = tuning(*parts)
        for name, linear in linears.items():  # rounded to the dtype of the old weights
            old, new = weight_of(linear), tuned[parameters[name]]
            new = new.movedim(1, -1).flatten(1) if is_convolution(linear) else to_layout(linear, new)
            self.pruned[name] = PrunedLayer.of(old, new.to(old.dtype), self.pruned[name].keep(old))
