"""The KVHeadConversion callback: fewer KV heads during training."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.adapters.merge import adapter_layers
from billhook.arguments import check_types
from billhook.callbacks.kv_stages import StageCallback, check_heads, check_over
from billhook.engine.passes import blockwise
from billhook.engine.sharding import sizes_only
from billhook.engine.store import store_of
from billhook.fit.calibration import BatchAndLoss, CalibrationLike, FitCalibration
from billhook.fit.event import Event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_close, check_identical, comm_of, fail_together, from_first_rank, sum_over_ranks
from billhook.fit.targets import At
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_by_layer, kv_heads_of, next_layers
from billhook.kv_heads.convert import batches_needed, check_ready, check_repair, equal_heads, fitting, turned_weights
from billhook.kv_heads.methods import HINT, KVMethod, Mean, Name, method_of
from billhook.kv_heads.plan import KVHeadPlan, check_in_part, plan_kv_heads
from billhook.kv_heads.pooling import approach
from billhook.model.find import find_transformer
from billhook.model.plan import Weights, apply_plan
from billhook.model.shape import Shape, shape_of
from billhook.model.surgery import assign_values, changed_names
from billhook.repairs.repair import RepairConfig
from billhook.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Preparation:
    """Settings for preparing the heads of a group for pooling during training."""

    method: KVMethod
    repair: RepairConfig | None
    calibration: FitCalibration

    def __post_init__(self) -> None:
        check_repair(self.method, self.repair)

    @property
    def needed(self) -> bool:
        """True if heads are rotated or layers are repaired."""
        return self.method.turns or self.repair is not None

    def check_data(self, fit: Fit) -> None:
        """Raises `ValueError` if there are too few batches, or they can be read only once."""
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        self.calibration.check(fit)
        with self.calibration.undisturbed(fit):
            count = sum(1 for _ in islice(self._pairs(fit), least))
        every = int(sum_over_ranks(fit, torch.tensor(count)))
        if every < least:
            held_out = ", because some are held out" if least > 1 else ""
            needed = "1 batch" if least == 1 else f"{least} batches"
            raise ValueError(
                f"calibration: {what} needs at least {needed}{held_out}, got {every} on all devices. Use more examples."
            )

    def ready(self, fit: Fit, plan: KVHeadPlan) -> tuple[KVHeadPlan, Weights, str]:
        """Returns the plan with optimizer restarts, the new weights, and a description."""
        model, groups = fit.model, dict.fromkeys(plan.layers, plan.after)
        with self.calibration.undisturbed(fit):
            batches = list(self._pairs(fit))
            comm = comm_of(fit, self.calibration.shared(fit))
            new = equal_heads(Attentions(model, groups, comm), self.method, batches, self.repair)
        plan, weights = fitting(model, plan, new)
        if not self.method.turns:  # the mean pools unchanged weights
            weights = weights.without(plan.parameters)
        return replace(plan, restart=tuple(changed_names(model, weights))), weights, new.how

    def check_same(self, fit: Fit, plan: KVHeadPlan, weights: Weights, trained: bool) -> None:
        """Checks that all ranks apply the same conversion.

        Before DDP wraps the model, each rank may have its own weights. New weights may differ by rounding; the first rank's
        are used once DDP wraps or FSDP2 shards the model.
        """
        model = fit.model
        pooled = {name: [pooling.dim, np.asarray(pooling.index)] for name, pooling in plan.parameters.items()}
        check_identical(fit, "KVHeadConversion", "the pooled heads", [str(self.method), str(self.repair), pooled, plan.rope])
        if trained:
            before = {name: model.get_parameter(name) for name in plan.parameters}
            check_close(fit, "KVHeadConversion", "the pooled heads", model, before)

    def turned(self, fit: Fit, groups: Mapping[str, int]) -> Weights:
        """Returns weights with each group's heads in a shared basis and the same outputs."""
        with self.calibration.undisturbed(fit):
            batches, (method,) = list(self._pairs(fit)), self.method.candidates
            return turned_weights(fit.model, groups, method, batches, comm_of(fit))

    def _pairs(self, fit: Fit) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches; none if they are optional and can be read only once."""
        if not batches_needed(self.method, self.repair)[0]:
            try:
                self.calibration.check(fit)
            except ValueError:
                return
        for batch, loss in self.calibration.pairs(fit):
            yield batch, partial(_precisely, fit, loss)


def _precisely(fit: Fit, loss: Any, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """Computes the loss in the training precision, while statistics use full precision."""
    with fit.forward_context():
        value: Tensor = loss(model, batch)
    return value


def _same(fit: Fit, model: nn.Module, weights: Weights) -> Weights:
    """Returns the first rank's new weights; raises `RanksDiffer` if the models differ."""
    what = "KVHeadConversion", "the rotated heads"
    if store_of(model).on_ranks:  # each rank has shards of the first rank's weights
        return weights
    check_close(fit, *what, model, {name: model.get_parameter(name) for name in weights})
    if fit.world_size == 1:
        return weights
    return {name: from_first_rank(fit, *what, weights[name]).to(weights[name].device) for name in weights}


@dataclass
class Moving:
    """Progress of gradual conversion."""

    moved: int = -1  # the last step after which heads moved
    turned: list[int] = field(default_factory=list)  # the stages whose heads are in one basis
    path: KVHeadPlan | None = None  # the target, for the current shape of the model

    def move(self, fit: Fit, preparation: Preparation, stage: int, share: float) -> None:
        """Moves the heads of a stage by a share of the distance to the pooled head."""
        model = fit.model
        if self.path is None:
            return
        if preparation.method.turns and stage not in self.turned:
            groups = dict.fromkeys(self.path.layers, self.path.after)
            with fail_together(fit, "KVHeadConversion"):
                with blockwise(fit.module):
                    weights = preparation.turned(fit, groups)
                    weights = _same(fit, model, weights)
                assign_values(model, weights, fit.optimizers)
            self.turned.append(stage)
        approach(model, self.path.parameters, share, preparation.method.pool)
        self.moved = fit.step

    def fits(self, fit: Fit) -> bool:
        """Returns whether `path` matches the current shape of the model."""
        if self.path is None:
            return False
        model, pooled = fit.model, self.path.parameters
        try:
            return all(model.get_parameter(name).shape[pooling.dim] == len(pooling.index) for name, pooling in pooled.items())
        except AttributeError:  # of a removed block
            return False


class KVHeadConversion(StageCallback):
    """Converts attention to fewer KV heads at given steps, before uptraining.

    Optimizer state is remapped, checkpoints store the shape, and a resumed run ends like an uninterrupted run. The optimizer
    state of heads that are rotated, reordered, or refitted restarts.

    Reference: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023),
    section 2.1, https://arxiv.org/abs/2305.13245

    Args:
        num_key_value_heads: Number of KV heads after the conversion, 1 for multi-query attention, or a list for several stages,
            such as `[4, 2, 1]`. Each must divide the number of query heads and the previous number of KV heads.
        at: When to convert: a step (int), a fraction of training (float), `"start"` (before the optimizer exists, or before the
            first step if batches are needed), or a list with one entry per stage. With one number of heads, also a schedule from
            0 to 1 of the fraction of converted attention modules, last modules first. The config keeps the old number until all
            are converted.
        method: Pooling method for the heads of a group: `"mean"` (the paper's), `"first"`, `"random"`, `"aligned"`, `"svd"`,
            `"auto"`, or a custom `KVMethod`. See `convert_kv_heads`. Defaults to `"auto"` with `calibration` and without `over`,
            and to `"mean"` otherwise.
        repair: Least-squares repair of consumer layers and MLPs (see `RepairConfig`). Defaults to None (off).
        over: Steps (int) or fraction of training (float) before each `at` during which heads are interpolated toward the pooled
            head, so that the conversion itself changes nothing. At step t of n they move by 1 / (n - t) of the remaining
            distance. With `"aligned"` or similarity grouping, heads are rotated and reordered first.
        encoder: If True, also converts the self-attention of an encoder-decoder's encoder, unlike the paper.
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 32 examples.
            Optional for `"aligned"` and similarity grouping.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: Before training, if arguments, model, or data are not legal.

    >>> import billhook as bh
    >>> callback = bh.KVHeadConversion(1, at=0.1, method="svd")  # for Trainer(callbacks=[callback])
    """

    blockwise = True

    def __init__(
        self,
        num_key_value_heads: int | list[int],
        at: At | list[At] | Schedule = "start",
        method: KVMethod | Name | None = None,
        repair: RepairConfig | None = None,
        over: int | float = 0,
        encoder: bool = False,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(KVHeadConversion, locals())
        chosen = method_of(method, has_data=calibration is not None and not over)
        self.preparation = Preparation(chosen, repair, FitCalibration.of(calibration, examples=32))
        self.num_key_value_heads, self.method, self.repair = num_key_value_heads, self.preparation.method, repair
        at_list: list[At | Schedule] = [*at] if isinstance(at, list | tuple) else [at]
        check_over(over, at_list, self.method, repair)
        heads, self.encoder = check_heads(num_key_value_heads, at_list), encoder
        at_steps = [0 if entry == "start" and self.preparation.needed else entry for entry in at_list]
        super().__init__(heads, at_steps, over, self.preparation.calibration, measure_batches)

    def reset(self) -> None:
        """Clears stages, plans, and progress."""
        super().reset()
        self._planned: tuple[tuple[Shape, int, list[str] | None], KVHeadPlan] | None = None
        self._moving = Moving()

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(num_key_value_heads=self.heads)

    @property
    def _by_layer(self) -> bool:
        return isinstance(self.at[0], Schedule)

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the model cannot be converted to the number of KV heads."""
        model = fit.module
        most = self._most(model)
        first = next((heads for heads in self.heads if heads < most), self.heads[-1])
        if first == most:
            return
        plan = self._plan_to(model, first)
        if self._by_layer:
            check_in_part(model, plan_kv_heads(model, first, layers=plan.layers[-1:], encoder=self.encoder))
        if self.preparation.needed:
            check_ready(fit.model, plan, self.preparation.repair)
        means = (callback for callback in fit.callbacks(KVHeadConversion) if type(callback.preparation.method) is Mean)
        if next(means, None) is self and not self.preparation.needed and not adapter_layers(fit.model):
            rank_zero_info(HINT)

    def reached(self, model: nn.Module) -> set[int]:
        """Returns the indices of stages whose number of KV heads the model has reached."""
        if not self._by_layer:
            most = self._most(model)
            return {number for number, heads in enumerate(self.heads) if most <= heads}
        now = kv_heads_by_layer(model, self.encoder)
        return {number for number, stage in enumerate(self._stages) if not next_layers(now, self.heads[0], stage.share)}

    def resolve(self, fit: Fit) -> None:
        """Resolves the steps and checks the stages against the loaded model."""
        super().resolve(fit)
        least, most = (
            min(heads for callback in fit.callbacks(KVHeadConversion) for heads in callback.heads),
            self._most(fit.module),
        )
        if most < least:
            raise ValueError(
                f"num_key_value_heads={self.heads}: the checkpoint has {most} KV heads, fewer than the {least} of this run. Use "
                "the settings of the run that saved it."
            )

    @property
    def needs_data(self) -> bool:
        """True if heads are rotated or layers are repaired."""
        return self.preparation.needed

    def check_data(self, fit: Fit) -> None:
        """Raises `ValueError` if there are too few batches, or they can be read only once."""
        with fail_together(fit, "KVHeadConversion"):
            self.preparation.check_data(fit)

    def change(self, fit: Fit, stage: int, optimizers: list[Optimizer]) -> str:
        """Converts the heads of a stage and returns a description."""
        model = fit.module
        plan, preparation = self._plan(model, stage), self.preparation
        weights: Weights = {}
        how = str(preparation.method)
        if self.over and self._stages[stage].begin <= self._moving.moved:
            how += f", over {self._stages[stage].over} steps"
        elif preparation.needed:
            plan, weights, how = preparation.ready(fit, plan)
        preparation.check_same(fit, plan, weights, trained=self._by_layer or self.at[stage] != "start")
        apply_plan(model, plan, optimizers, weights)
        where = (
            f" in {len(plan.layers)} of {len(kv_heads_by_layer(model, self.encoder))} attention modules" if self._by_layer else ""
        )
        return f"{plan.before} -> {plan.after} KV heads{where} ({how})"

    def label(self, event: Event) -> str:
        """Returns the number of heads before and after, and the method."""
        brief, *more = re.split("[,;]", str(event["what"]), maxsplit=1)
        return f"{brief})" if more else brief

    def _run(self, fit: Fit) -> None:
        after, step = self._last_step, fit.step
        super()._run(fit)
        moving = [index for index, stage in enumerate(self._stages) if stage.begin <= step < stage.step]
        if moving and step > self._moving.moved:
            stage, stride = moving[0], max(1, step - after) if after >= 0 else 1
            if not self._moving.fits(fit):
                self._moving.path = None if stage in self._done else self._plan(fit.module, stage)
            share = min(1.0, stride / (self._stages[stage].step - step))
            self._moving.move(fit, self.preparation, stage, share)

    def _plan(self, model: nn.Module, stage: int) -> KVHeadPlan:
        """Returns the plan of a stage for the current model."""
        if not self._by_layer:
            return self._plan_to(model, self.heads[stage])
        now = kv_heads_by_layer(model, self.encoder)
        return self._plan_to(model, self.heads[0], next_layers(now, self.heads[0], self._stages[stage].share))

    def _plan_to(self, model: nn.Module, heads: int, layers: list[str] | None = None) -> KVHeadPlan:
        """Returns a plan for fewer KV heads, cached for each shape of the model."""
        of = shape_of(find_transformer(model)), heads, layers
        if self._planned is None or self._planned[0] != of:
            with sizes_only(model):
                self._planned = of, plan_kv_heads(model, heads, self.preparation.method, layers, self.encoder)
        return self._planned[1]

    def _most(self, model: nn.Module) -> int:
        return max(kv_heads_by_layer(model, self.encoder).values()) if self.encoder else kv_heads_of(model)

    def state_dict(self) -> dict[str, Any]:
        """Returns events and progress; the LightningModule saves the shape."""
        return super().state_dict() | {"moved": self._moving.moved, "turned": self._moving.turned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores events and progress."""
        super().load_state_dict(state_dict)
        self._moving = Moving(state_dict["moved"], list(state_dict["turned"]))
