"""Importance of a block as its effect on the hidden states.

"ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (Men et al., 2024,
https://arxiv.org/abs/2403.03853), equation 1.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from billhook.engine import Run, SideBySide
from billhook.importance.score import Importance, Sums
from billhook.units import PLURAL, Per, UnitsByModule, hidden_states, returned_states


@dataclass(frozen=True)
class BlockInfluence(Importance):
    """Scores a block by the change of direction of the hidden states (ShortGPT, equation 1).

    BI_i = 1 - E[h_i . h_(i+1) / (|h_i| |h_(i+1)|)], the mean over non-padding tokens, with the input h_i and the output h_(i+1)
    of block i. Needs a forward pass per batch, and neither labels nor gradients.

    Raises:
        ValueError: On scoring, if the units are not blocks.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "block"), bh.importance.BlockInfluence(), [model.dummy_inputs])
        >>> {name: len(values) for name, values in scores.items()}
        {'model.layers': 4}
    """

    blockwise = True

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`.

        Raises:
            ValueError: If units are not blocks.
        """
        sums, together = Sums.zero(units, per), SideBySide(model)
        for name, module_units in units.items():
            if module_units.kind != "block":
                kind = PLURAL[module_units.kind]
                raise ValueError(f"importance=BlockInfluence() scores only blocks, and the units of {name} are {kind}.")

        def note(name: str, block_index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
            inputs = hidden_states([*args, *kwargs.values()])
            returned = None if inputs is None else returned_states(inputs, output)
            if inputs is not None and returned is not None:
                cosines = cosine_similarity(inputs.detach().float(), returned.detach().float(), dim=-1)
                tokens = runs[together.run].tokens.get(units[name].name)
                if tokens is not None and tokens.shape == cosines.shape:
                    cosines = cosines[tokens.to(cosines.device)]
                sums.totals[name][block_index] += float(cosines.cpu().double().sum())
                sums.counts[name][block_index] += cosines.numel()

        with ExitStack() as hooks, torch.no_grad():
            for name, module_units in units.items():
                for block_index in range(module_units.count()):
                    block = model.get_submodule(f"{module_units.name}.{block_index}")
                    hooks.callback(block.register_forward_hook(partial(note, name, block_index), with_kwargs=True).remove)
            together([run.visit for run in runs])
        return sums

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a module. See `Importance.of_mean`."""
        return 1 - mean
