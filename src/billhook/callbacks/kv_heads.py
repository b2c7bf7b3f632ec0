"""Multi-head to grouped-query to multi-query attention, at given steps of a fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
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
from billhook.fit.ranks import check_close, check_identical, comm_of, fail_together, from_first_rank, sum_over_ranks
from billhook.fit.run import At, callbacks_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_by_layer, kv_heads_of, next_layers
from billhook.kv_heads.convert import batches_needed, check_ready, check_repair, ready_weights, turned_weights
from billhook.kv_heads.methods import KVMethod, Mean, Name, method_of
from billhook.kv_heads.plan import KVHeadPlan, check_in_part, plan_kv_heads
from billhook.kv_heads.pooling import approach
from billhook.model.find import find_transformer
from billhook.model.plan import Weights, apply_plan
from billhook.model.shape import Shape, shape_of
from billhook.model.surgery import assign_values, changed_names
from billhook.repairs.repair import RepairConfig
from billhook.schedules import Schedule

HINT = (
    "billhook: KV heads are mean-pooled, as in the paper. method='svd' starts far nearer to the dense model (SmolLM2-135M, 3 -> "
    "1 KV heads, perplexity right after: 14,841 with 'mean', 109 with 'svd'); 'auto' takes what stays nearest on held-out batches"
)


@dataclass(frozen=True, eq=False)
class Preparation:
    """How the heads of a group become equal before they are pooled, in the middle of a fit."""

    method: KVMethod
    repair: RepairConfig | None
    calibration: FitCalibration

    def __post_init__(self) -> None:
        check_repair(self.method, self.repair)

    @property
    def needed(self) -> bool:
        """True if there is anything to do before heads are pooled."""
        return self.method.turns or self.repair is not None

    def check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit whose batches can be read only once, or are too few."""
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        self.calibration.check(trainer)
        with self.calibration.undisturbed(pl_module):
            count = sum(1 for _ in islice(self._pairs(trainer, pl_module), least))
        every = int(sum_over_ranks(trainer, torch.tensor(count)))
        if every < least:
            source = f"examples={self.calibration.examples}" if self.calibration.batches is None else "calibration"
            held_out = ", as some are held out" if least > 1 else ""
            many = "a batch" if least == 1 else f"{least} batches"
            raise ValueError(f"{source}: {what} needs {many} at least{held_out}; all devices together have {every}")

    def ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan) -> tuple[KVHeadPlan, Weights, str]:
        """Returns the plan with what restarts, the values that it starts from, and how they came to be."""
        model, groups = find_transformer(pl_module), dict.fromkeys(plan.layers, plan.after)
        with self.calibration.undisturbed(pl_module):
            batches = list(self._pairs(trainer, pl_module))
            comm = comm_of(trainer, self.calibration.shared(trainer))
            weights, how = ready_weights(Attentions(model, groups, comm), self.method, batches, self.repair)
        if not self.method.turns:  # what the mean pools is as it was
            weights = weights.without(plan.parameters)
        return replace(plan, restart=tuple(changed_names(model, weights))), weights, how

    def check_same(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: KVHeadPlan, weights: Weights, trained: bool
    ) -> None:
        """Makes sure that ranks convert the same to the same; before DDP has the model, each may have weights of its own.

        New weights may be rounded otherwise: those of the first count, when DDP wraps the model or when they are sharded.
        """
        model = find_transformer(pl_module)
        pooled = {name: [pooling.dim, np.asarray(pooling.index)] for name, pooling in plan.parameters.items()}
        check_identical(trainer, "KVHeadConversion", "what heads become", [str(self.method), str(self.repair), pooled])
        if trained:
            before = {name: model.get_parameter(name) for name in plan.parameters}
            check_close(trainer, "KVHeadConversion", "what heads become", model, before)

    def turned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: Mapping[str, int]) -> Weights:
        """Returns values with which the heads of a group lie in one basis, and the model computes what it did."""
        with self.calibration.undisturbed(pl_module):
            batches, (method,) = list(self._pairs(trainer, pl_module)), self.method.candidates
            return turned_weights(find_transformer(pl_module), groups, method, batches, comm_of(trainer))

    def _pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches; none where they can be read only once and are not needed."""
        if not batches_needed(self.method, self.repair)[0]:
            try:
                self.calibration.check(trainer)
            except ValueError:
                return
        for batch, loss in self.calibration.pairs(trainer, pl_module):
            yield batch, partial(_precisely, trainer, loss)


def _precisely(trainer: pl.Trainer, loss: Any, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """Returns a loss in the precision of the fit, while what is made of the batches is in full precision."""
    with trainer.precision_plugin.forward_context():
        value: Tensor = loss(model, batch)
    return value


def _same(trainer: pl.Trainer, model: nn.Module, weights: Weights) -> Weights:
    """Returns new weights, those of the first rank where each has all of them; refuses ranks whose models differ."""
    what = "KVHeadConversion", "how heads are turned"
    if store_of(model).on_ranks:  # each has its shards of those of the first
        return weights
    check_close(trainer, *what, model, {name: model.get_parameter(name) for name in weights})
    if trainer.world_size == 1:
        return weights
    return {name: from_first_rank(trainer, *what, weights[name]).to(weights[name].device) for name in weights}


@dataclass
class Moving:
    """How far the heads of a group have moved towards each other."""

    moved: int = -1  # the last step after which they did
    turned: list[int] = field(default_factory=list)  # the stages whose heads have been put in one basis
    path: KVHeadPlan | None = None  # to what they move, while it is of the model as it is

    def move(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, preparation: Preparation, stage: int, share: float
    ) -> None:
        """Moves the heads that a stage is to cut along `path`, by a share of the remaining way, once they lie in one basis."""
        model = find_transformer(pl_module)
        if self.path is None:
            return
        if preparation.method.turns and stage not in self.turned:
            groups = dict.fromkeys(self.path.layers, self.path.after)
            with fail_together(trainer, "KVHeadConversion"):
                with blockwise(pl_module):
                    weights = preparation.turned(trainer, pl_module, groups)
                    weights = _same(trainer, model, weights)
                assign_values(model, weights, trainer.optimizers)
            self.turned.append(stage)
        approach(model, self.path.parameters, share, preparation.method.pool)
        self.moved = trainer.global_step

    def fits(self, pl_module: pl.LightningModule) -> bool:
        """Returns whether the model still has the heads that `path` is of."""
        if self.path is None:
            return False
        model, pooled = find_transformer(pl_module), self.path.parameters
        try:
            return all(model.get_parameter(name).shape[pooling.dim] == len(pooling.index) for name, pooling in pooled.items())
        except AttributeError:  # of a block that is gone
            return False


class KVHeadConversion(StageCallback):
    """Converts to fewer key/value heads at given steps of a fit; training then continues (uptraining).

    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
    (https://arxiv.org/abs/2305.13245), section 2.1. Optimizer state follows, checkpoints carry the shape, and a resumed run ends
    as the straight run does. Where heads are turned, change places or are refitted, their optimizer state restarts.

    Args:
        num_key_value_heads: KV heads after the conversion, 1 for multi-query attention; a list for several stages, as in
            `[4, 2, 1]`. Each divides both the KV heads before it and the query heads.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the optimizer exists; before the
            first step if batches are needed); a list, one per stage. Or, with one number of heads, a schedule that rises to 1:
            the share of the attentions converted by each step, the last ones first (self- and cross-attention of a decoder's
            block are two). Until all are converted the config keeps the old number.
        method: How the heads of a group become one: any `KVMethod`, or `"mean"` (the paper's), `"first"`, `"random"`,
            `"aligned"`, `"svd"` or `"auto"`; see `convert_kv_heads`.
        repair: How what reads the heads, and the feed-forwards, make up for what is lost: least squares on the batches (see
            `RepairConfig`); by default they keep their weights.
        over: Steps (int), or a fraction of training (float), before each `at` in which the heads of a group move towards what
            they are pooled to, so that nothing is lost when they are cut: at t of n steps by 1 / (n - t) of the remaining way.
            With `"aligned"`, or similar heads grouped, they are turned and put in order first.
        encoder: Whether the self-attention of an encoder-decoder's encoder is converted too; as in the paper it is not.
        calibration: Batches that show what heads do, text as a `Calibration`, or a number of training
            examples, by default 32.
            `"aligned"` and similar heads do without them where these can be read only once.
        measure_batches: Validation batches to measure before and after each stage; by default all of validation, 0 for none.

    Raises:
        ValueError: If arguments, model or data do not allow it; before training.

    >>> import billhook as bh
    >>> callback = bh.KVHeadConversion(1, at=0.1, method="svd")  # for Trainer(callbacks=[callback])
    """

    blockwise = True

    def __init__(
        self,
        num_key_value_heads: int | list[int],
        at: At | list[At] | Schedule = "start",
        method: KVMethod | Name = "mean",
        repair: RepairConfig | None = None,
        over: int | float = 0,
        encoder: bool = False,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(KVHeadConversion, locals())
        self.preparation = Preparation(method_of(method), repair, FitCalibration.of(calibration, examples=32))
        self.num_key_value_heads, self.method, self.repair = num_key_value_heads, self.preparation.method, repair
        at_list: list[At | Schedule] = [*at] if isinstance(at, list | tuple) else [at]
        check_over(over, at_list, self.method, repair)
        heads, self.encoder = check_heads(num_key_value_heads, at_list), encoder
        at_steps = [0 if entry == "start" and self.preparation.needed else entry for entry in at_list]
        super().__init__(heads, at_steps, over, self.preparation.calibration, measure_batches)

    def reset(self) -> None:
        """Forgets all stages and plans, and how far heads have moved."""
        super().reset()
        self._planned: tuple[tuple[Shape, int, list[str] | None], KVHeadPlan] | None = None
        self._moving = Moving()

    @property
    def state_key(self) -> str:
        """The key under which checkpoints keep this callback's state."""
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
        plan = self._plan_to(model, first)
        if self._by_layer:
            check_in_part(model, plan_kv_heads(model, first, layers=plan.layers[-1:], encoder=self.encoder))
        if self.preparation.needed:
            ready = self.preparation.method, self.preparation.repair
            check_ready(find_transformer(model), dict.fromkeys(plan.layers, first), *ready)
        means = (callback for callback in callbacks_of(trainer, KVHeadConversion) if type(callback.preparation.method) is Mean)
        if next(means, None) is self and not self.preparation.needed and not adapter_layers(find_transformer(model)):
            rank_zero_info(HINT)

    def reached(self, model: nn.Module) -> set[int]:
        """Returns the numbers of the stages that lead to no fewer KV heads than the model has."""
        if not self._by_layer:
            most = self._most(model)
            return {number for number, heads in enumerate(self.heads) if most <= heads}
        now = kv_heads_by_layer(model, self.encoder)
        return {number for number, stage in enumerate(self._stages) if not next_layers(now, self.heads[0], stage.share)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns fractions of training into steps, and checks the stages, also against a checkpoint that has been loaded."""
        super().on_fit_start(trainer, pl_module)
        least, most = (
            min(heads for callback in callbacks_of(trainer, KVHeadConversion) for heads in callback.heads),
            self._most(pl_module),
        )
        if most < least:
            held = f"the checkpoint holds a model with {most} KV heads"
            raise ValueError(f"num_key_value_heads={self.heads}: {held}, which is fewer than the {least} that this run leads to")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a fit without batches, and carries out what is due before the first step."""
        if self._most(pl_module) > self.heads[-1]:
            with fail_together(trainer, "KVHeadConversion"):
                self.preparation.check_data(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Converts, and returns from how many heads to how many."""
        assert isinstance(model, pl.LightningModule)
        plan, preparation = self._plan(model, stage), self.preparation
        weights: Weights = {}
        how = str(preparation.method)
        if self.over and self._stages[stage].begin <= self._moving.moved:
            how += f", over {self._stages[stage].over} steps"
        elif preparation.needed:
            plan, weights, how = preparation.ready(model.trainer, model, plan)
        preparation.check_same(model.trainer, model, plan, weights, trained=bool(optimizers))
        apply_plan(model, plan, optimizers, weights)
        where = f" in {len(plan.layers)} of {len(kv_heads_by_layer(model, self.encoder))} attentions" if self._by_layer else ""
        return f"{plan.before} -> {plan.after} KV heads{where} ({how})"

    def label(self, event: Event) -> str:
        """Returns from how many heads to how many, and by which method."""
        brief, _, more = str(event["what"]).partition(",")
        return f"{brief})" if more else brief

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        after, step = self._last_step, trainer.global_step
        super()._run(trainer, pl_module)
        moving = [index for index, stage in enumerate(self._stages) if stage.begin <= step < stage.step]
        if moving and step > self._moving.moved:
            stage, stride = moving[0], max(1, step - after) if after >= 0 else 1
            if not self._moving.fits(pl_module):
                self._moving.path = None if stage in self._done else self._plan(pl_module, stage)
            share = min(1.0, stride / (self._stages[stage].step - step))
            self._moving.move(trainer, pl_module, self.preparation, stage, share)

    def _plan(self, model: nn.Module, stage: int) -> KVHeadPlan:
        """Returns what a stage does to the model as it is."""
        if not self._by_layer:
            return self._plan_to(model, self.heads[stage])
        now = kv_heads_by_layer(model, self.encoder)
        return self._plan_to(model, self.heads[0], next_layers(now, self.heads[0], self._stages[stage].share))

    def _plan_to(self, model: nn.Module, heads: int, layers: list[str] | None = None) -> KVHeadPlan:
        """Plans fewer KV heads, once for each shape of the model: to check it, to move heads, and to cut them."""
        of = shape_of(find_transformer(model)), heads, layers
        if self._planned is None or self._planned[0] != of:
            with sizes_only(model):
                self._planned = of, plan_kv_heads(model, heads, self.preparation.method, layers, self.encoder)
        return self._planned[1]

    def _most(self, model: nn.Module) -> int:
        return max(kv_heads_by_layer(model, self.encoder).values()) if self.encoder else kv_heads_of(model)

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far; the shape itself is in the LightningModule's part of the checkpoint."""
        return super().state_dict() | {"moved": self._moving.moved, "turned": self._moving.turned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self._moving = Moving(state_dict["moved"], list(state_dict["turned"]))
