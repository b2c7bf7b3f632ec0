"""Stages of KV-head conversion: steps, targets, and gradual conversion."""

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int
from billhook.fit.calibration import FitCalibration
from billhook.fit.event import log_event
from billhook.fit.fit import Fit
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, check_at, resolve_at, share_targets
from billhook.kv_heads.methods import KVMethod
from billhook.model.surgery import check_replaceable
from billhook.repairs.repair import RepairConfig
from billhook.schedules import Schedule, check_step


@dataclass(frozen=True)
class Stage:
    """A conversion of some attention modules at a step."""

    step: int  # -1 for before the optimizer exists
    heads: int
    share: float = 1.0  # fraction of attention modules converted by then
    over: int = 0  # steps of gradual conversion before

    @property
    def begin(self) -> int:
        """The step after which gradual conversion starts."""
        return self.step - self.over


def check_heads(num_key_value_heads: int | list[int], at: Sequence[At | Schedule]) -> list[int]:
    """Returns the KV heads of all stages; raises `ValueError` if they are not legal."""
    heads = list(num_key_value_heads) if isinstance(num_key_value_heads, list | tuple) else [num_key_value_heads]
    if len(heads) != len(at) or not heads:
        raise ValueError(f"num_key_value_heads={heads} and at={at} must have the same length, at least 1.")
    if len(heads) > 1 and any(isinstance(entry, Schedule) for entry in at):
        raise ValueError(f"at={at}: a schedule needs a single number of heads, got num_key_value_heads={heads}.")
    for number in heads:
        check_int("num_key_value_heads", number)
    if any(before <= after or before % after for before, after in pairwise(heads)):
        raise ValueError(f"num_key_value_heads={heads}: each stage must be smaller than the one before and divide it.")
    return heads


def check_over(over: int | float, at: Sequence[At | Schedule], method: KVMethod, repair: RepairConfig | None) -> None:
    """Raises `ValueError` if gradual conversion is not possible."""
    check_step(over, "over")
    if not over:
        return
    if "start" in at:
        raise ValueError(f"over={over} needs steps before the conversion, and at='start' has none. Use a later step.")
    if repair is not None:
        raise ValueError(f"over={over} cannot be combined with repair, because gradual conversion leaves no error. Remove one.")
    if not method.has_path:
        raise ValueError(
            f"over={over} is not supported by method='{method}', which does not interpolate. Use 'mean', 'first', or 'aligned'."
        )


def check_order(stages: Sequence[tuple[Stage, object]]) -> None:
    """Raises `ValueError` if heads do not decrease from stage to stage, or stages overlap.

    Each stage comes with its callback. Stages of one callback may have the same number: they convert different modules.
    """
    ordered = sorted(stages, key=lambda pair: pair[0].step)
    for (before, callback), (after, other) in zip(ordered, ordered[1:], strict=False):
        goes_on = callback is other and before.heads == after.heads
        if not goes_on and (before.heads <= after.heads or before.heads % after.heads):
            order = ", ".join(f"{stage.heads} at step {max(stage.step, 0)}" for stage, _ in ordered)
            raise ValueError(
                f"num_key_value_heads: each stage must have fewer KV heads than the one before and divide it, got {order}."
            )
    earlier = 0
    for stage, _ in ordered:
        if stage.over and stage.begin < earlier:
            since = f"since the stage at step {earlier}" if earlier else "since training began"
            raise ValueError(
                f"over={stage.over} steps do not fit before the stage at step {stage.step}: there are {stage.step - earlier} "
                f"{since}."
            )
        earlier = max(stage.step, 0)


class StageCallback(ShapeCallback):
    """Reduces KV heads in stages, each at a step.

    The model's shape determines which stages are done, also after loading a checkpoint of other stages. It is checked once, when
    training begins.
    """

    must_resume = False  # the shape tells which stages are done

    def __init__(
        self,
        heads: list[int],
        at: Sequence[At | Schedule],
        over: int | float,
        calibration: FitCalibration,
        measure_batches: int | None,
    ) -> None:
        for entry in at:
            check_at(entry)
        self.heads, self.at, self.over, self.moves_weights = heads, list(at), over, bool(over)
        self._stages: list[Stage] = []
        self._done: set[int] = set()  # indices of finished stages
        self._replaced: list[weakref.ref[nn.Parameter]] = []  # at the start; an optimizer that holds one would not train the new
        super().__init__(calibration, measure_batches)

    @abstractmethod
    def reached(self, model: nn.Module) -> set[int]:
        """Returns the indices of stages that the model's shape has reached."""

    @abstractmethod
    def change(self, fit: Fit, stage: int, optimizers: list[Optimizer]) -> str:
        """Applies a stage and returns a description."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes during training."""
        return all(entry == "start" for entry in self.at)

    def begin(self, fit: Fit) -> None:
        """Checks all stages and applies stages at the start."""
        super().begin(fit)
        others = [entry for callback in fit.callbacks(StageCallback) for entry in callback.at if entry != "start"]
        if fit.max_steps is not None:
            self.check_together(fit, fit.max_steps)
        elif others and "start" in self.at:
            raise ValueError(
                f"at={self.at}: 'start' together with later stages ({others}) needs a known training length. Set "
                "Trainer(max_steps=...) alone, or use 0 instead of 'start'."
            )
        for index, entry in enumerate(self.at):
            if entry == "start" and not fit.is_tuning and index not in self.reached(fit.module):
                optimizers = fit.existing_optimizers
                check_replaceable(fit.module, optimizers, type(self).__name__)
                before = list(fit.module.parameters())
                with fit.reshaping(self.blockwise):  # `configure_model` may have sharded it
                    event = self.record_event(fit, {}, partial(self.change, fit, index, optimizers))
                log_event(fit, event)
                after = set(map(id, fit.module.parameters()))
                self._replaced += [weakref.ref(parameter) for parameter in before if id(parameter) not in after]

    def stages(self, total: int | None, fit: Fit) -> list[Stage]:
        """Returns the stages with resolved steps; a fraction `over` gives at least 1 step."""
        trial, first, over = fit.is_trial, self.at[0], int(self.over)
        if isinstance(self.over, float) and self.over:
            over = max(1, resolve_at(self.over, total, name="over"))
        if isinstance(first, Schedule):
            shares = share_targets(first, total, trial)
            cuts = [(step, self.heads[0], share) for step, share in shares.items()]
        else:
            steps = []
            for entry in self.at:
                assert not isinstance(entry, Schedule)
                steps.append(-1 if entry == "start" else resolve_at(entry, total, trial))
            if not trial and len(set(steps)) < len(steps):
                raise ValueError(f"at={self.at}: two stages have the same step ({steps} of {total} steps). Use other steps.")
            cuts = [(step, heads, 1.0) for step, heads in zip(steps, self.heads, strict=True)]
        stages = []
        for step, heads, share in cuts:
            stages.append(Stage(step, heads, share, over=min(over, max(step, 0)) if trial else over))
        return stages

    def shape_steps(self, total: int | None, fit: Fit) -> list[int]:
        """Returns the step of each stage; -1 means before the optimizer exists."""
        return [stage.step for stage in self.stages(total, fit)]

    def steps(self, total: int | None, fit: Fit) -> dict[int, float]:
        """Returns the steps of the stages, each with the target 1."""
        return dict.fromkeys(self.shape_steps(total, fit), 1.0)

    def check_together(self, fit: Fit, total: int | None) -> None:
        """Raises `ValueError` if stages of all callbacks share a step or contradict each other."""
        stages = [(stage, callback) for callback in fit.callbacks(StageCallback) for stage in callback.stages(total, fit)]
        steps = [stage.step for stage, _ in stages]
        if fit.is_trial:
            return
        if len(set(steps)) < len(steps):
            raise ValueError(f"two {type(self).__name__} stages have the same step: {sorted(steps)}. Use other steps.")
        check_order(stages)

    def resolve(self, fit: Fit) -> None:
        """Resolves the steps and checks the stages."""
        total = fit.length
        self.check_together(fit, total)
        self._stages = self.stages(total, fit)

    def begin_training(self, fit: Fit) -> None:
        """Applies events that are due before the first step, or that a resumed checkpoint lacks."""
        replaced = {id(parameter) for ref in self._replaced if (parameter := ref()) is not None}
        for optimizer in fit.optimizers:
            if any(id(parameter) in replaced for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    f"at='start': {type(optimizer).__name__} was created before training and holds parameters that "
                    f"{type(self).__name__} has replaced. Create it in configure_optimizers, or convert at step 0 (at=0)."
                )
        self._done = self.reached(fit.module)
        if any(stage.step == -1 and number not in self._done for number, stage in enumerate(self._stages)):
            self.events = []  # a checkpoint without this callback undid the stage at the start
        super().begin_training(fit)

    def due(self, model: nn.Module, step: int) -> list[int]:
        """Returns the indices of stages that are due, in the order of their steps."""
        stages = sorted(enumerate(self._stages), key=lambda pair: pair[1].step)
        return [number for number, stage in stages if stage.step <= step and number not in self._done]

    def pending_steps(self, model: nn.Module, step: int) -> list[int]:
        """Returns the steps of the pending stages."""
        return [stage.step for number, stage in enumerate(self._stages) if stage.step > step and number not in self._done]

    def apply_event(self, fit: Fit, stage: int) -> None:
        """Applies a stage, unless the model already has as few heads."""
        if stage not in self.reached(fit.module):
            self.apply_change(fit, partial(self.change, fit, stage))
        self._done.add(stage)
