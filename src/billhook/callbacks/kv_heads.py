"""Multi-head to grouped-query to multi-query attention, at given steps of a fit."""

import itertools

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.callbacks.shape_event import At, ShapeCallback
from billhook.run import callbacks_of, is_trial
from billhook.structure.kv_heads import Method, check_request, convert_kv_heads, kv_heads_of, plan_kv_heads


class KVHeadConversion(ShapeCallback):
    """Fewer key/value heads at given steps of a fit; training then goes on (uptraining; GQA, 2305.13245, section 2.1).

    Optimizer state follows, checkpoints carry the shape, and a resumed run ends as the straight run does.

    Args:
        num_key_value_heads: KV heads after the conversion, 1 for multi-query attention; a list for several stages, as in
            `[4, 2, 1]`. Each divides both the KV heads before it and the query heads.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the optimizer exists); a list, one
            per stage.
        method: How a group of heads becomes one: `"mean"` (the paper's), `"first"`, or `"random"` (drawn anew).
        seed: For `"random"`.
        measure_batches: Validation batches on which the model is measured before and after each stage; by default as many
            as validation takes, 0 for none.

    Raises:
        ValueError: If a number of heads, a step or the method is not legal, or the model cannot be converted; before training.
    """

    def __init__(
        self,
        num_key_value_heads: int | list[int],
        at: At | list[At] = "start",
        method: Method = "mean",
        seed: int = 0,
        measure_batches: int | None = None,
    ) -> None:
        super().__init__(list(at) if isinstance(at, list | tuple) else [at], measure_batches)
        heads = [num_key_value_heads] if isinstance(num_key_value_heads, int | float | str) else list(num_key_value_heads)
        if len(heads) != len(self.at) or not heads:
            raise ValueError(f"num_key_value_heads={heads} and at={self.at} must have the same length, one at least")
        for number in heads:
            check_request(number, method)
        if any(before <= after or before % after for before, after in itertools.pairwise(heads)):
            raise ValueError(f"num_key_value_heads={heads}: each stage must have fewer heads than the one before, and divide it")
        self.heads, self.method, self.seed = heads, method, seed

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(num_key_value_heads=self.heads)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model, or a number of heads, that cannot be converted."""
        for callback in callbacks_of(trainer, KVHeadConversion):
            if callback.state_key == self.state_key and callback is not self:
                raise ValueError(f"two KVHeadConversion lead to num_key_value_heads={self.heads}: one is enough")
        first = next((heads for stage, heads in enumerate(self.heads) if not self.is_done(model, stage)), self.heads[-1])
        if first != kv_heads_of(model):
            plan_kv_heads(model, first, self.method)

    def check_together(self, trainer: pl.Trainer, total_steps: int) -> None:
        """Refuses stages, also of several callbacks together, that do not lead to ever fewer heads, each dividing the last."""
        super().check_together(trainer, total_steps)
        callbacks = callbacks_of(trainer, KVHeadConversion)
        stages = sorted(pair for c in callbacks for pair in zip(c.steps(total_steps, trainer), c.heads, strict=True))
        pairs = [(before, after) for (_, before), (_, after) in itertools.pairwise(stages)]
        if not is_trial(trainer) and any(before <= after or before % after for before, after in pairs):
            told = ", ".join(f"{heads} at step {max(step, 0)}" for step, heads in stages)
            raise ValueError(
                f"num_key_value_heads: each stage must have fewer KV heads than the one before, and divide it; got {told}"
            )

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Whether the model has as few KV heads as a stage leads to."""
        return kv_heads_of(model) <= self.heads[stage]

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Converts, and says from how many heads to how many."""
        plan = convert_kv_heads(model, self.heads[stage], self.method, optimizers, self.seed)
        return f"{plan.before} -> {plan.after} KV heads ({plan.method})"
