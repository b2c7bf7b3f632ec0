"""When attentions have fewer KV heads, and when their heads begin to move: the stages of a fit."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int
from billhook.fit.calibration import FitCalibration
from billhook.fit.event import log_event
from billhook.fit.lightning_internals import is_tuning
from billhook.fit.run import At, callbacks_of, check_at, is_dev_run, resolve_at, share_targets, training_steps
from billhook.fit.shape_event import ShapeCallback, unwrapped
from billhook.kv_heads.methods import KVMethod
from billhook.repairs.repair import RepairConfig
from billhook.schedules import Schedule, check_step


@dataclass(frozen=True)
class Stage:
    """Some attentions have fewer KV heads from a step on."""

    step: int  # -1 for before the optimizer exists
    heads: int
    share: float = 1.0  # of all attentions, which has as few by then
    over: int = 0  # for so many steps before, the heads of a group move towards each other

    @property
    def begin(self) -> int:
        """The step after which heads begin to move."""
        return self.step - self.over


def check_heads(num_key_value_heads: int | list[int], at: Sequence[At | Schedule]) -> list[int]:
    """Returns the KV heads of all stages; refuses those that do not fall, each dividing the one before, one for each moment."""
    heads = list(num_key_value_heads) if isinstance(num_key_value_heads, list | tuple) else [num_key_value_heads]
    if len(heads) != len(at) or not heads:
        raise ValueError(f"num_key_value_heads={heads} and at={at} must have the same length, one at least")
    if len(heads) > 1 and any(isinstance(entry, Schedule) for entry in at):
        raise ValueError(f"at={at}: a schedule goes with one number of heads, not with num_key_value_heads={heads}")
    for number in heads:
        check_int("num_key_value_heads", number)
    if any(before <= after or before % after for before, after in pairwise(heads)):
        raise ValueError(f"num_key_value_heads={heads}: each stage must have fewer heads than the one before, and divide it")
    return heads


def check_over(over: int | float, at: Sequence[At | Schedule], method: KVMethod, repair: RepairConfig | None) -> None:
    """Refuses a way between heads and what they become where there is none."""
    check_step(over, "over")
    if not over:
        return
    if "start" in at:
        raise ValueError(f"over={over}: before at='start' there are no steps in which heads could move: give a later step")
    if repair is not None:
        raise ValueError(f"over={over} and repair: heads that have moved lose nothing when they are cut; leave one out")
    if not method.has_path:
        raise ValueError(
            f"over={over}: method='{method.name}' has no path between the heads and what they become; 'mean', "
            "'first' and 'aligned' have one"
        )


def check_order(stages: Sequence[tuple[Stage, object]]) -> None:
    """Refuses stages that do not lead to ever fewer heads, each dividing those before, or that begin before another has ended.

    Each comes with what it is of: those of one that have the same number convert one attention after another.
    """
    ordered = sorted(stages, key=lambda pair: pair[0].step)
    for (before, callback), (after, other) in zip(ordered, ordered[1:], strict=False):
        goes_on = callback is other and before.heads == after.heads
        if not goes_on and (before.heads <= after.heads or before.heads % after.heads):
            order = ", ".join(f"{stage.heads} at step {max(stage.step, 0)}" for stage, _ in ordered)
            raise ValueError(
                f"num_key_value_heads: each stage must have fewer KV heads than the one before, and divide it; got {order}"
            )
    earlier = 0
    for stage, _ in ordered:
        if stage.over and stage.begin < earlier:
            since = f"since the stage at step {earlier}" if earlier else "since training began"
            raise ValueError(
                f"over={stage.over} steps must fit in before the stage at step {stage.step}, and there are "
                f"{stage.step - earlier} {since}"
            )
        earlier = max(stage.step, 0)


class StageCallback(ShapeCallback):
    """Has fewer KV heads in one or more stages, each at its step.

    The shape in a checkpoint says which are done, whatever stages its fit had; it is asked once, when training begins.
    """

    must_resume = False  # the shape says it

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
        self._done: set[int] = set()  # stages that are done, by their number; heads only get fewer
        super().__init__(calibration, measure_batches)

    @abstractmethod
    def reached(self, model: nn.Module) -> set[int]:
        """Returns the numbers of the stages to which, or beyond which, the model's shape has come."""

    @abstractmethod
    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Carries out a stage and returns a phrase that says what was done."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes in the middle of the fit."""
        return all(entry == "start" for entry in self.at)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks all stages, and carries out those at the start."""
        super().begin(trainer, pl_module)
        others = [entry for callback in callbacks_of(trainer, StageCallback) for entry in callback.at if entry != "start"]
        if is_dev_run(trainer) or (trainer.max_steps > 0 and trainer.max_epochs in (-1, None)):
            self.check_together(trainer, trainer.max_steps)
        elif others and "start" in self.at:
            raise ValueError(
                f"at={self.at}: 'start' next to later stages ({others}) needs a length that is known at the start: "
                "set max_steps alone, or give 0 instead of 'start'"
            )
        for index, entry in enumerate(self.at):
            if entry == "start" and not is_tuning(trainer) and index not in self.reached(pl_module):
                with unwrapped(trainer, self.blockwise):  # a model that is made late is sharded already
                    event = self.record_event(trainer, pl_module, {}, partial(self.change, pl_module, index, []))
                log_event(trainer, event)

    def stages(self, total: int | None, trainer: pl.Trainer) -> list[Stage]:
        """Returns when heads move and when they are cut; of `over` as a fraction of training, one step at least."""
        trial, first, over = is_dev_run(trainer), self.at[0], int(self.over)
        if isinstance(self.over, float) and self.over:
            over = max(1, resolve_at(self.over, total, name="over"))
        if isinstance(first, Schedule):
            cuts = [(step, self.heads[0], share) for step, share in share_targets(first, total, trial).items()]
        else:
            entries = [entry for entry in self.at if not isinstance(entry, Schedule)]
            steps = [-1 if entry == "start" else resolve_at(entry, total, trial) for entry in entries]
            if not trial and len(set(steps)) < len(steps):
                raise ValueError(f"at={self.at}: two stages fall on one step ({steps} of {total} steps)")
            cuts = [(step, heads, 1.0) for step, heads in zip(steps, self.heads, strict=True)]
        return [Stage(*cut, over=min(over, max(cut[0], 0)) if trial else over) for cut in cuts]

    def shape_steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """Returns the step of each stage, -1 for the start."""
        return [stage.step for stage in self.stages(total, trainer)]

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns the steps of the stages; each is done as a whole."""
        return dict.fromkeys(self.shape_steps(total, trainer), 1.0)

    def check_together(self, trainer: pl.Trainer, total: int | None) -> None:
        """Refuses stages, also of several callbacks together, that fall on one step or contradict each other."""
        stages = [
            (stage, callback) for callback in callbacks_of(trainer, StageCallback) for stage in callback.stages(total, trainer)
        ]
        steps = [stage.step for stage, _ in stages]
        if is_dev_run(trainer):
            return
        if len(set(steps)) < len(steps):
            raise ValueError(f"two {type(self).__name__} fall on one step: their steps are {sorted(steps)}")
        check_order(stages)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns fractions of training into steps, and checks the stages."""
        total = training_steps(trainer)
        self.check_together(trainer, total)
        self._stages = self.stages(total, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        self._done = self.reached(pl_module)
        if any(stage.step == -1 and number not in self._done for number, stage in enumerate(self._stages)):
            self.events = []  # a checkpoint of a run without this callback undid the stage at the start
        super().on_train_start(trainer, pl_module)

    def due(self, model: nn.Module, step: int) -> list[int]:
        """Returns the stages that have come and are not done, by their number, in the order of their steps."""
        stages = sorted(enumerate(self._stages), key=lambda pair: pair[1].step)
        return [number for number, stage in stages if stage.step <= step and number not in self._done]

    def pending_steps(self, model: nn.Module, step: int) -> list[int]:
        """Returns the steps of the stages that are still to come."""
        return [stage.step for number, stage in enumerate(self._stages) if stage.step > step and number not in self._done]

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: int) -> None:
        """Carries out a stage, unless another callback has left no more heads since training began."""
        if stage not in self.reached(pl_module):
            self.apply_change(trainer, pl_module, partial(self.change, pl_module, stage))
        self._done.add(stage)
