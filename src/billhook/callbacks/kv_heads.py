"""The KVHeadConversion callback: fewer KV heads during training."""

import re
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.adapters.merge import adapter_layers
from billhook.arguments import check_int, check_types
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import sizes_only
from billhook.fit.calibration import BatchAndLoss, CalibrationLike, FitCalibration
from billhook.fit.event import Event, log_event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_close, check_identical, comm_of, fail_together, sum_over_ranks
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, Targets, check_at, resolve_at
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.config import kv_heads_by_layer, kv_heads_of
from billhook.kv_heads.convert import batches_needed, check_repair, equal_heads, find_attentions
from billhook.kv_heads.methods import HINT, KVMethod, Mean, Name, method_of
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model import Shape, Weights, apply_plan, changed_names, check_replaceable, find_transformer, shape_of
from billhook.repairs.polish import PolishConfig
from billhook.repairs.repair import RepairConfig


def _precisely(fit: Fit, loss: Any, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """Computes the loss in the training precision, while statistics use full precision."""
    with fit.forward_context():
        value: Tensor = loss(model, batch)
    return value


class KVHeadConversion(PolishingCallback, ShapeCallback):
    """Converts attention to fewer KV heads at given steps, before uptraining.

    Optimizer state is remapped, checkpoints store the shape, and a resumed run ends like an uninterrupted run. The optimizer
    state of heads that are rotated, reordered, or refitted restarts.

    Reference: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023),
    section 2.1, https://arxiv.org/abs/2305.13245

    Args:
        num_key_value_heads: Number of KV heads after the conversion, 1 for multi-query attention, or a list for several stages,
            such as `[4, 2, 1]`. Each must divide the number of query heads and the previous number of KV heads.
        at: When to convert: a step (int), a fraction of training (float), `"start"` (before the optimizer exists, or before the
            first step if batches are needed), or a list with one entry per stage.
        method: Pooling method for the heads of a group: `"mean"` (the paper's), `"first"`, `"random"`, `"aligned"`, `"svd"`,
            `"auto"`, or a custom `KVMethod`. See `convert_kv_heads`. Defaults to `"auto"` with `calibration`, and to
            `"mean"` otherwise.
        repair: Least-squares repair of consumer layers and MLPs (see `RepairConfig`). Defaults to None (off).
        polish: Training toward the model before each stage, on the calibration data (see `PolishConfig`). Defaults to None (off).
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
    must_resume = False  # the shape tells which stages are done

    def __init__(
        self,
        num_key_value_heads: int | list[int],
        at: At | list[At] = "start",
        method: KVMethod | Name | None = None,
        repair: RepairConfig | None = None,
        polish: PolishConfig | None = None,
        encoder: bool = False,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(KVHeadConversion, locals())
        chosen = method_of(method, has_data=calibration is not None)
        check_repair(chosen, repair)
        self.num_key_value_heads = num_key_value_heads
        self.method = chosen
        self.repair = repair
        self.polish = polish
        self.encoder = encoder
        at_list = [*at] if isinstance(at, list | tuple) else [at]
        for entry in at_list:
            check_at(entry)
        self.heads = [*num_key_value_heads] if isinstance(num_key_value_heads, list | tuple) else [num_key_value_heads]
        if len(self.heads) != len(at_list) or not self.heads:
            raise ValueError(f"num_key_value_heads={self.heads} and at={at_list} must have the same length, at least 1.")
        for number in self.heads:
            check_int("num_key_value_heads", number)
        if any(before <= after or before % after for before, after in pairwise(self.heads)):
            raise ValueError(f"num_key_value_heads={self.heads}: each stage must be smaller than the one before and divide it.")
        self.at = [0 if entry == "start" and (self.needs_data or polish is not None) else entry for entry in at_list]
        self._stages: list[int] = []  # the step of each
        self._done: set[int] = set()  # indices of finished stages
        self._replaced: list[weakref.ref[nn.Parameter]] = []  # at the start; an optimizer that holds one would not train the new
        super().__init__(FitCalibration.of(calibration, examples=32), measure_batches)

    def reset(self) -> None:
        """Clears events and the plan."""
        super().reset()
        self._planned: tuple[tuple[Shape, int], KVHeadPlan] | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(num_key_value_heads=self.heads)

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes during training."""
        return all(entry == "start" for entry in self.at)

    def begin(self, fit: Fit) -> None:
        """Checks all stages and applies stages at the start."""
        super().begin(fit)
        others = [entry for callback in fit.callbacks(KVHeadConversion) for entry in callback.at if entry != "start"]
        if fit.max_steps is not None:
            self._check_together(fit)
        elif others and "start" in self.at:
            raise ValueError(
                f"at={self.at}: 'start' together with later stages ({others}) needs a known training length. Set "
                "Trainer(max_steps=...) alone, or use 0 instead of 'start'."
            )
        for index, entry in enumerate(self.at):
            if entry == "start" and not fit.is_tuning and index not in self._reached(fit.module):
                optimizers = fit.existing_optimizers
                check_replaceable(fit.module, optimizers, type(self).__name__)
                before = list(fit.module.parameters())
                with fit.reshaping(self.blockwise):  # `configure_model` may have sharded it
                    event = self.record_event(fit, {}, partial(self._convert, fit, index, optimizers))
                log_event(fit, event)
                after = set(map(id, fit.module.parameters()))
                self._replaced += [weakref.ref(parameter) for parameter in before if id(parameter) not in after]

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the model cannot be converted to the number of KV heads."""
        most = self._most(fit.module)
        first = next((heads for heads in self.heads if heads < most), self.heads[-1])
        if first == most:
            return
        plan = self._plan(fit.module, first)
        if self.needs_data:
            find_attentions(fit.model, plan, self.repair)
        means = (callback for callback in fit.callbacks(KVHeadConversion) if type(callback.method) is Mean)
        if next(means, None) is self and not self.needs_data and not adapter_layers(fit.model):
            rank_zero_info(HINT)

    def shape_steps(self, fit: Fit) -> list[int]:
        """Returns the step of each stage; -1 means before the optimizer exists."""
        steps = [-1 if entry == "start" else resolve_at(entry, fit) for entry in self.at]
        if not fit.is_trial and len(set(steps)) < len(steps):
            raise ValueError(f"at={self.at}: two stages have the same step ({steps} of {fit.length} steps). Use other steps.")
        return steps

    def steps(self, fit: Fit) -> Targets:
        """Returns the steps of the stages, each with the target 1."""
        return dict.fromkeys(self.shape_steps(fit), 1.0)

    def _check_together(self, fit: Fit) -> None:
        """Raises `ValueError` if two stages share a step, or heads do not decrease."""
        if fit.is_trial:
            return
        stages = sorted(
            stage
            for callback in fit.callbacks(KVHeadConversion)
            for stage in zip(callback.shape_steps(fit), callback.heads, strict=True)
        )
        if len(dict(stages)) < len(stages):
            steps = [step for step, _ in stages]
            raise ValueError(f"two {type(self).__name__} stages have the same step: {steps}. Use other steps.")
        if any(before <= after or before % after for (_, before), (_, after) in pairwise(stages)):
            order = ", ".join(f"{heads} at step {max(step, 0)}" for step, heads in stages)
            raise ValueError(
                f"num_key_value_heads: each stage must have fewer KV heads than the one before and divide it, got {order}."
            )

    def resolve(self, fit: Fit) -> None:
        """Resolves the steps, and checks the stages also against the loaded model."""
        self._check_together(fit)
        self._stages = self.shape_steps(fit)
        least = min(heads for callback in fit.callbacks(KVHeadConversion) for heads in callback.heads)
        if (most := self._most(fit.module)) < least:
            raise ValueError(
                f"num_key_value_heads={self.heads}: the checkpoint has {most} KV heads, fewer than the {least} of this run. Use "
                "the settings of the run that saved it."
            )

    @property
    def needs_data(self) -> bool:
        """True if heads are rotated or layers are repaired."""
        return self.method.turns or self.repair is not None

    def check_data(self, fit: Fit) -> None:
        """Raises `ValueError` if there are too few batches, or they can be read only once."""
        self.check_polish(fit)
        least, what = batches_needed(self.method, self.repair)
        if not least:
            return
        with fail_together(fit, "KVHeadConversion"):
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

    def _pairs(self, fit: Fit) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches; none if they are optional and can be read only once."""
        if not batches_needed(self.method, self.repair)[0]:
            try:
                self.calibration.check(fit)
            except ValueError:
                return
        for batch, loss in self.calibration.pairs(fit):
            yield batch, partial(_precisely, fit, loss)

    def begin_training(self, fit: Fit) -> None:
        """Applies events that are due before the first step, or that a resumed checkpoint lacks."""
        replaced = {id(parameter) for ref in self._replaced if (parameter := ref()) is not None}
        for optimizer in fit.optimizers:
            if any(id(parameter) in replaced for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    f"at='start': {type(optimizer).__name__} was created before training and holds parameters that "
                    f"{type(self).__name__} has replaced. Create it in configure_optimizers, or convert at step 0 (at=0)."
                )
        self._done = self._reached(fit.module)
        if any(step == -1 and index not in self._done for index, step in enumerate(self._stages)):
            self.events = []  # a checkpoint without this callback undid the stage at the start
        super().begin_training(fit)

    def due(self, fit: Fit) -> list[int]:
        """Returns the steps of stages that are due, in order."""
        return sorted({at for index, at in enumerate(self._stages) if at <= fit.step and index not in self._done})

    def pending_steps(self, fit: Fit) -> list[int]:
        """Returns the steps of the pending stages."""
        return [at for index, at in enumerate(self._stages) if at > fit.step and index not in self._done]

    def apply_event(self, fit: Fit, step: int) -> None:
        """Applies the stages of a step, unless the model already has as few heads."""
        for stage, at in enumerate(self._stages):
            if at == step and stage not in self._done:
                if stage not in self._reached(fit.module):
                    self.apply_change(fit, step, partial(self._convert, fit, stage))
                self._done.add(stage)

    def label(self, event: Event) -> str:
        """Returns the number of heads before and after, and the method."""
        brief, *more = re.split("[,;]", str(event["what"]), maxsplit=1)
        return f"{brief})" if more else brief

    def _convert(self, fit: Fit, stage: int, optimizers: list[Optimizer]) -> str:
        model = fit.model
        plan = self._plan(fit.module, self.heads[stage])
        how = str(self.method)
        weights: Weights = {}
        if self.needs_data:
            with self.calibration.undisturbed(fit):
                groups = dict.fromkeys(plan.layers, plan.after)
                comm = comm_of(fit, self.calibration.shared(fit))
                new = equal_heads(Attentions(model, groups, comm), self.method, list(self._pairs(fit)), self.repair)
            weights = new.values if self.method.turns else new.values.without(plan.parameters)  # the mean pools unchanged weights
            plan = plan.starting_from(changed_names(model, weights), new.rope)
            how = new.how
            del new  # the pooled layers' values, if the mean does not use them
        pooled = {name: [pooling.dim, np.asarray(pooling.index)] for name, pooling in plan.parameters.items()}
        check_identical(fit, "KVHeadConversion", "the pooled heads", [str(self.method), str(self.repair), pooled, plan.rope])
        if self.at[stage] != "start":  # before DDP wraps the model, each rank may have its own weights
            parameters = {name: model.get_parameter(name) for name in plan.parameters}
            check_close(fit, "KVHeadConversion", "the pooled heads", model, parameters)
        apply_plan(fit.module, plan, optimizers, weights)
        return f"{plan.before} -> {plan.after} KV heads ({how})"

    def _plan(self, model: nn.Module, heads: int) -> KVHeadPlan:
        """Returns a plan for fewer KV heads, cached for each shape of the model."""
        of = shape_of(find_transformer(model)), heads
        if self._planned is None or self._planned[0] != of:
            with sizes_only(model):
                self._planned = of, plan_kv_heads(model, heads, self.method, encoder=self.encoder)
        return self._planned[1]

    def _reached(self, model: nn.Module) -> set[int]:
        """Returns the indices of stages whose number of KV heads the model has reached."""
        most = self._most(model)
        return {index for index, heads in enumerate(self.heads) if most <= heads}

    def _most(self, model: nn.Module) -> int:
        return max(kv_heads_by_layer(model, self.encoder).values()) if self.encoder else kv_heads_of(model)
