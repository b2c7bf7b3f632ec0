"""Multi-head to grouped-query to multi-query attention, at given steps of a fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.arguments import whole
from billhook.callbacks.kv_preparation import Preparation
from billhook.callbacks.kv_stages import Stage, check_order, steps_over
from billhook.fit.calibration import Calibration, Given
from billhook.fit.ranks import check_agreed, together
from billhook.fit.rounds import At, shares_of
from billhook.fit.run import callbacks_of, is_trial, training_steps
from billhook.fit.shape_event import unwrapped
from billhook.fit.stages import StageCallback
from billhook.kv_heads.approach import approach
from billhook.kv_heads.layerwise import check_in_part, next_layers
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.methods.mean import Mean
from billhook.kv_heads.methods.named import Name, method_of
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.kv_heads.scope import kv_heads_by_layer, kv_heads_of
from billhook.model.find import find_transformer
from billhook.model.plan import apply
from billhook.model.surgery import changed, take
from billhook.repairs.repair import Repair
from billhook.schedules import Schedule, check_step

HINT = (
    "billhook: KV heads are mean-pooled, as in the paper. method='svd' starts far nearer to the dense model (SmolLM2-135M, 3 -> "
    "1 KV heads, perplexity right after: 14,841 with 'mean', 109 with 'svd'); 'auto' takes what is best on held-out batches"
)


class KVHeadConversion(StageCallback):
    """Fewer key/value heads at given steps of a fit; training then goes on (uptraining; GQA, 2305.13245, section 2.1).

    Optimizer state follows, checkpoints carry the shape, and a resumed run ends as the straight run does. Where heads are turned,
    change places or are refitted, the state of their parameters means nothing any more, and the optimizer starts anew for these.

    Args:
        num_key_value_heads: KV heads after the conversion, 1 for multi-query attention; a list for several stages, as in
            `[4, 2, 1]`. Each divides both the KV heads before it and the query heads.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the optimizer exists; before the
            first step where it takes more than the weights); a list, one per stage. Or, with one number of heads, a schedule that
            rises to 1: which share of the attentions has been converted at which step, the last ones first. Self- and
            cross-attention of a decoder's block are two, and go in the opposite of the order in which they run. Until all have
            gone the config says the old number.
        method: How a group of heads becomes one: `"mean"` (the paper's), `"first"`, or `"random"` (drawn anew); `"aligned"`:
            turned towards each other, which changes nothing in the model, and then the mean; `"svd"`: the best low-rank rendering
            of what examples show; `"auto"`: the best of `"mean"`, `"aligned"` and `"svd"`, of both groupings, on examples that
            are held out.
        repair: How what reads the heads, and the feed-forwards, make up for what is lost: least squares on the examples (see
            `Repair`); by default they keep their weights.
        over: Steps (int), or a fraction of training (float), before each `at` in which the heads of a group move towards their
            mean (with `"first"` towards the first), so that nothing is lost when they are cut: at t of n steps by 1 / (n - t) of
            the way that is left. With `"aligned"`, or similar heads grouped, they are turned and put in order first.
        encoder: Whether the self-attention of an encoder-decoder's encoder is converted too; as in the paper it is not.
        calibration: Batches that show what heads do, or a number of training examples, by default 32; see `Calibration`.
            `"aligned"` and similar heads do without them where these can be read only once.
        measure_batches: Validation batches on which the model is measured before and after each stage; by default as many
            as validation takes, 0 for none.

    Raises:
        ValueError: If an argument is not legal, arguments contradict each other, the model cannot be converted, or the fit cannot
            give the batches that are needed; before training.
    """

    def __init__(
        self,
        num_key_value_heads: int | list[int],
        at: At | list[At] | Schedule = "start",
        method: KVMethod | Name = "mean",
        repair: Repair | None = None,
        over: int | float = 0,
        encoder: bool = False,
        calibration: Given = None,
        measure_batches: int | None = None,
    ) -> None:
        self.preparation = Preparation(method_of(method), repair, Calibration.of(calibration, examples=32))
        moments: list[At | Schedule] = [*at] if isinstance(at, list | tuple) else [at]
        _check_over(over, moments, self.preparation)
        self._stages: list[Stage] = []
        at_steps = [0 if moment == "start" and self.preparation.needed else moment for moment in moments]
        super().__init__(at_steps, self.preparation.calibration, measure_batches)
        heads = list(num_key_value_heads) if isinstance(num_key_value_heads, list | tuple) else [num_key_value_heads]
        if len(heads) != len(self.at) or not heads:
            raise ValueError(f"num_key_value_heads={heads} and at={self.at} must have the same length, one at least")
        if len(heads) > 1 and any(isinstance(moment, Schedule) for moment in moments):
            raise ValueError(f"at={self.at}: a schedule goes with one number of heads, not with num_key_value_heads={heads}")
        for number in heads:
            whole("num_key_value_heads", number)
        if any(before <= after or before % after for before, after in zip(heads, heads[1:], strict=False)):
            raise ValueError(f"num_key_value_heads={heads}: each stage must have fewer heads than the one before, and divide it")
        self.heads, self.over, self.encoder = heads, over, encoder
        self.moves = bool(over)

    def reset(self) -> None:
        """Forgets all stages, and how far heads have moved."""
        super().reset()
        self._moved, self._turned = -1, list[int]()
        self._path: KVHeadPlan | None = None

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(num_key_value_heads=self.heads)

    @property
    def _by_layer(self) -> bool:
        return isinstance(self.at[0], Schedule)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model, or a number of heads, that cannot be converted."""
        most = self._most(model)
        first = next((heads for heads in self.heads if heads < most), self.heads[-1])
        if first == most:
            return
        plan = plan_kv_heads(model, first, encoder=self.encoder)
        if self._by_layer:
            check_in_part(model, plan_kv_heads(model, first, layers=plan.layers[-1:], encoder=self.encoder))
        self.preparation.check(find_transformer(model), dict.fromkeys(plan.layers, first))
        means = [one for one in callbacks_of(trainer, KVHeadConversion) if type(one.preparation.method) is Mean]
        if means[:1] == [self] and not self.preparation.needed:
            rank_zero_info(HINT)

    def stages(self, total: int | None, trainer: pl.Trainer) -> list[Stage]:
        """When heads move and when they are cut.

        Raises:
            ValueError: As `steps`; or if a schedule does not rise to 1.
        """
        trial, (moment, *_) = is_trial(trainer), self.at
        over = steps_over(self.over, total)
        if isinstance(moment, Schedule):
            shares = shares_of(moment, total, trial)
            cuts = [(step, self.heads[0], share) for step, share in shares.items()]
        else:
            steps = super().steps(total, trainer)
            cuts = [(step, heads, 1.0) for step, heads in zip(steps, self.heads, strict=True)]
        return [Stage(*cut, over=min(over, max(cut[0], 0)) if trial else over) for cut in cuts]

    def steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """The step of each stage, -1 for the start."""
        return [stage.step for stage in self.stages(total, trainer)]

    def check_together(self, trainer: pl.Trainer, total: int | None) -> None:
        """Refuses stages, also of several callbacks together, that contradict each other."""
        super().check_together(trainer, total)
        callbacks = callbacks_of(trainer, KVHeadConversion)
        if not is_trial(trainer):
            check_order([(stage, callback) for callback in callbacks for stage in callback.stages(total, trainer)])

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Whether the model has as few KV heads as a stage leads to."""
        return not self._next(model, stage) if self._by_layer else self._most(model) <= self.heads[stage]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns fractions of training into steps, and checks the stages, also against a checkpoint that has been loaded."""
        super().on_fit_start(trainer, pl_module)
        least = min(number for callback in callbacks_of(trainer, KVHeadConversion) for number in callback.heads)
        if self._most(pl_module) < least:
            raise ValueError(
                f"num_key_value_heads={self.heads}: the checkpoint holds a model with {self._most(pl_module)} KV heads, which is "
                f"fewer than the {least} that this run leads to"
            )
        self._stages = self.stages(training_steps(trainer), trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that there are batches, and carries out what is due before the first step."""
        if self._most(pl_module) > self.heads[-1]:
            with together(trainer, "KVHeadConversion"):
                self.preparation.check_data(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Converts, and says from how many heads to how many."""
        assert isinstance(model, pl.LightningModule)
        plan, own = self._plan(model, stage), self.preparation
        told = f"{plan.before} -> {plan.after} KV heads"
        if self._by_layer:
            told += f" in {len(plan.layers)} of {len(kv_heads_by_layer(model, self.encoder))} attentions"
        moved = self.over and self._stages[stage].begin <= self._moved
        if moved or not own.needed:
            self._check_agreed(model, plan, {}, optimizers)
            apply(model, plan, optimizers)
            return f"{told} ({own.method}{f', over {self._stages[stage].over} steps' if moved else ''})"
        weights, how = own.weights(model.trainer, model, dict.fromkeys(plan.layers, plan.after))
        if not own.method.turns:  # what the mean pools is as it was
            weights = {name: values for name, values in weights.items() if name not in plan.parameters}
        self._check_agreed(model, plan, weights, optimizers)
        restart = tuple(changed(find_transformer(model), weights))
        apply(model, replace(plan, restart=restart), optimizers, weights)
        return f"{told} ({how})"

    def _check_agreed(
        self, model: pl.LightningModule, plan: KVHeadPlan, weights: Mapping[str, Tensor], optimizers: list[Optimizer]
    ) -> None:
        """Makes sure that ranks convert the same to the same; before DDP has the model, each may have weights of its own."""
        module = find_transformer(model)
        pooled = {name: [own.dim, np.asarray(own.index)] for name, own in plan.parameters.items()}
        before = {name: module.get_parameter(name) for name in plan.parameters} if optimizers else {}
        check_agreed(model.trainer, "KVHeadConversion", "what heads become", [pooled, before, weights])

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after, step = self._last_step, trainer.global_step
        super()._run(trainer, pl_module)
        moving = [index for index, stage in enumerate(self._stages) if stage.begin <= step < stage.step]
        if moving and step > self._moved:
            self._approach(trainer, pl_module, moving[0], stride=max(1, step - after) if after >= 0 else 1)

    def _approach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int, stride: int) -> None:
        """Moves the heads that a stage is to cut, when they lie in one basis, by what so many steps are of the way."""
        model, step = find_transformer(pl_module), trainer.global_step
        if self._path is None or not _fits(self._path, model):
            self._path = None if self.is_done(model, stage) else self._plan(model, stage)
        if self._path is None:
            return
        if self.preparation.method.turns and stage not in self._turned:
            groups = dict.fromkeys(self._path.layers, self._path.after)
            with unwrapped(trainer), together(trainer, "KVHeadConversion"):
                weights = self.preparation.turned(trainer, pl_module, groups)
                check_agreed(trainer, "KVHeadConversion", "how heads are turned", weights)
                take(model, weights, trainer.optimizers)
            self._turned.append(stage)
        share = min(1.0, stride / (self._stages[stage].step - step))
        approach(model, self._path.parameters, share, self.preparation.method.pool)
        self._moved = step

    def _plan(self, model: nn.Module, stage: int) -> KVHeadPlan:
        """What a stage does to the model as it is."""
        layers = self._next(model, stage) if self._by_layer else None
        return plan_kv_heads(model, self._heads(stage), self.preparation.method, layers, self.encoder)

    def _heads(self, stage: int) -> int:
        return self.heads[0 if self._by_layer else stage]

    def _next(self, model: nn.Module, stage: int) -> list[str]:
        return next_layers(kv_heads_by_layer(model, self.encoder), self._heads(stage), self._stages[stage].share)

    def _most(self, model: nn.Module) -> int:
        return max(kv_heads_by_layer(model, self.encoder).values()) if self.encoder else kv_heads_of(model)

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far; the shape itself is in the LightningModule's part of the checkpoint."""
        return super().state_dict() | {"moved": self._moved, "turned": self._turned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        super().load_state_dict(state_dict)
        self._path, self._moved, self._turned = None, state_dict["moved"], list(state_dict["turned"])


def _fits(plan: KVHeadPlan, model: nn.Module) -> bool:
    """Whether a model still has the heads that a plan is of."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return all(name in sizes and sizes[name][own.dim] == len(own.index) for name, own in plan.parameters.items())


def _check_over(over: int | float, moments: Sequence[At | Schedule], preparation: Preparation) -> None:
    """Refuses a way between heads and what they become where there is none.

    Raises:
        ValueError: With the reason.
    """
    check_step(over, "over")
    if not over:
        return
    if "start" in moments:
        raise ValueError(f"over={over}: before at='start' there are no steps in which heads could move: give a later step")
    if preparation.repair is not None:
        raise ValueError(f"over={over} and repair: heads that have moved lose nothing when they are cut; leave one out")
    if not preparation.method.has_path:
        raise ValueError(
            f"over={over}: method='{preparation.method.name}' has no path between the heads and what they become; 'mean', "
            "'first' and 'aligned' have one"
        )
