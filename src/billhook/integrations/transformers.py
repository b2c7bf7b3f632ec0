"""billhook's callbacks in transformers' Trainer, and in trainers that derive from it."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from billhook.adapters.merge import adapters_removed, has_adapters
from billhook.arguments import check_types
from billhook.callbacks.export import Export
from billhook.checkpoints.save import state_shape
from billhook.engine import overridden, replace_file, store_of
from billhook.fit.callback import FitCallback
from billhook.fit.event import EventCallback, State, events_of
from billhook.fit.resume import check_callbacks
from billhook.fit.shape_event import ShapeCallback
from billhook.integrations.transformers_fit import TransformersFit, val_metrics
from billhook.model import find_transformer

STATE = "billhook_fit.pt"
"""File of a checkpoint folder with the state of callbacks."""
BASE = "base_model"
"""Folder of a PEFT checkpoint with the base model, once an event has changed it in training."""
LORA = re.compile(r"\.lora_\w+\.(\w+)")
"""Part of a parameter's name with the name of its adapter."""


class Callbacks(TrainerCallback, ExportableState):
    """Runs billhook's callbacks in transformers' Trainer, and in trainers derived from it.

    Events at the start happen when the Trainer is created, before the model is wrapped and the optimizer exists, if they need no
    data or their calibration is not drawn from the training data; otherwise, and later ones, before the step that they are due
    at. The optimizer follows. Each checkpoint folder also gets the state of the callbacks, and its config the shape of the model.
    To resume a run whose shapes change after the start, load the model from the checkpoint: `bh.load("out/checkpoint-50")`. With
    PEFT, load the base model from `out/checkpoint-50/base_model`, and the adapters with `PeftModel.from_pretrained`.

    Before and after events, the model is validated on `validation`: `val_loss`, and `val_perplexity` of language models. These
    and other metrics of callbacks go to the Trainer's `state.log_history`, and events to its `trainer_state.json`.

    Args:
        callbacks: billhook's callbacks, such as `bh.WeightPruning(...)`, in the order of their events. `Report` and `Export` come
            last.
        validation: Batches with labels for metrics before and after events. Defaults to the Trainer's evaluation data, once it
            has evaluated.

    Raises:
        ValueError: If a callback is not billhook's. When the Trainer is created or training begins, if the Trainer does not
            support a callback or has several `Callbacks`.

    Example:
        >>> import billhook as bh
        >>> from billhook.integrations.transformers import Callbacks
        >>> callbacks = Callbacks([bh.WeightPruning(sparsity=0.5, calibration=64), bh.Export("outputs/model")])
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callbacks]).train()
    """

    state_key = "Callbacks"  # Lightning asks for it

    def __init__(self, callbacks: Sequence[FitCallback], validation: Iterable[Any] | None = None) -> None:
        self.callbacks = list(callbacks)
        self.validation = validation
        for callback in self.callbacks:
            if not isinstance(callback, FitCallback):
                raise ValueError(
                    f"callbacks: {type(callback).__name__} is not one of billhook's callbacks. Pass transformers' callbacks to "
                    "the Trainer directly."
                )
        check_types(Callbacks, locals())
        self._fit: TransformersFit | None = None
        self._metrics: dict[str, float] = {}
        self._run = uuid4().hex  # in both files of a checkpoint, so that they are known to belong together
        self._loaded: tuple[int, str] | None = None  # step and run of the checkpoint that the model was loaded from
        self._repeatable = 0  # events that happen again when the model is created as before
        self._shape_check: RemovableHandle | None = None

    def setup(self, *_: object, **__: object) -> None:
        """Raises `ValueError`: Lightning's Trainer calls this."""
        raise ValueError("Callbacks is for transformers' Trainer. Pass its callbacks to Lightning's Trainer directly.")

    def on_exception(self, *_: object) -> None:
        """Does nothing: Lightning's Trainer calls this after an error."""

    def state(self) -> State:
        """Returns the events for `trainer_state.json`; the rest is in a file of each checkpoint."""
        return {"args": {}, "attributes": {"events": [] if self._fit is None else events_of(self._fit), "run": self._run}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **hooked: Any) -> None:  # noqa: ANN401
        """Checks callbacks and model, and applies events at the start that need no training data."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True replaces Callbacks. It restores its own state: set False."
            )
        self._state_of(state)
        folder = Path(str(find_transformer(hooked["model"]).config.name_or_path))
        saved = _read(folder.parent if folder.name == BASE else folder)
        self._loaded = None if saved is None else (saved["step"], saved["run"])
        self._metrics = {}
        with self._fitting(args, state, control, hooked, resumes=saved is not None) as fit:
            for callback in self.callbacks:
                callback.prepare(fit)
            if saved is not None:
                self._restore(saved)
            self._shape_check = fit.model.register_load_state_dict_pre_hook(_refuse_other_shape)  # type: ignore[no-untyped-call]
            for callback in self.callbacks if saved is None else ():
                if isinstance(callback, EventCallback) and _starts(callback):
                    if callback.needs_data and callback.calibration.batches is None:  # it waits for the training data
                        break  # later events must not overtake it
                    callback.resolve(fit)
                    callback.begin_training(fit)
            self._repeatable = len(events_of(fit)) if saved is None else 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **hooked: Any) -> None:  # noqa: ANN401
        """Restores a resumed run, checks later events, and applies due events."""
        if self._fit is None:
            if late := [callback for callback in self.callbacks if _starts(callback)]:
                raise ValueError(
                    f"{type(late[0]).__name__} has an event at the start, so Callbacks must be in Trainer(callbacks=[...]); "
                    "add_callback is too late."
                )
            self.on_init_end(args, state, control, **hooked)
        elif self._fit.module is not hooked["model"]:
            raise ValueError("the Trainer created its model again (model_init). Pass Trainer(model=...).")
        if state.global_step and (state.global_step, self._state_of(state)["run"]) != self._loaded:
            self._restore(self._find(args, state))
        if not state.global_step and self._loaded is not None:
            raise ValueError(
                f"the model is from step {self._loaded[0]} of a run with these callbacks. Call "
                "train(resume_from_checkpoint=...), or load a model that bh.save has saved."
            )
        with self._fitting(args, state, control, hooked, resumes=bool(state.global_step)) as fit:
            for callback in self.callbacks:
                callback.resolve(fit)
            for event_callback in fit.callbacks(EventCallback):  # can its events after the start happen in this Trainer?
                name = type(event_callback).__name__
                steps = event_callback.pending_steps(fit)
                if isinstance(event_callback, ShapeCallback):
                    steps = [step for step in event_callback.shape_steps(fit) if step > fit.step]
                    if not event_callback.only_at_start and event_callback.due(fit):
                        steps.insert(0, fit.step)  # the model is wrapped by now
                    if steps:
                        fit.check_reshaping_later(name, steps[0])
                if args.load_best_model_at_end and steps and steps[-1] > 0:
                    raise ValueError(
                        f"load_best_model_at_end=True may load weights from before the event of {name} at step {steps[-1]}. Set "
                        "it to False, or use at='start'."
                    )
            for callback in self.callbacks:
                callback.begin_training(fit)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **hooked: Any) -> None:  # noqa: ANN401
        """Applies events that are due after the last step."""
        with self._fitting(args, state, control, hooked) as fit:
            for callback in self.callbacks:
                callback.after_batch(fit)
            for callback in self.callbacks:
                callback.before_batch(fit, None)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **hooked: Any,  # noqa: ANN401
    ) -> None:
        """Passes the metrics on."""
        self._metrics = val_metrics(metrics or {}, hooked["model"])
        if self._fit is not None and self._fit.optimizers:
            with self._fitting(args, state, control, hooked) as fit:
                for callback in self.callbacks:
                    callback.after_validation(fit)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **hooked: Any) -> None:  # noqa: ANN401
        """Writes the state of callbacks into the checkpoint folder."""
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        entries = dict[str, Any]()
        for callback in self.callbacks:
            entries |= callback.checkpoint_entries() if isinstance(callback, EventCallback) else {}
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        fit = self._fit
        if not args.should_save or not folder.is_dir():
            return
        saves_base = fit is not None and self._changes_base(fit)
        if fit is not None and saves_base:  # the base model of adapters, beside them, and named as their base
            base = (folder / BASE).absolute()
            shutil.rmtree(base, ignore_errors=True)  # of a checkpoint that this one replaces
            # else transformers saves adapters alone
            with adapters_removed(fit.model), overridden(fit.model, _hf_peft_config_loaded=False):
                state_shape(fit.model)
                store_of(fit.model).write(base)
            for preprocessor in fit.preprocessors():
                preprocessor.save_pretrained(base)
            for file in folder.rglob("adapter_config.json"):  # so that AutoPeftModel finds this base, and not the dense one
                file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}, indent=2))
            rank_zero_info(
                f"billhook: the adapters in {folder} fit only the base model that events have left, saved in {base.name}/"
            )
        saved = {"step": state.global_step, "run": self._run, "callbacks": states, "base": saves_base, **entries}
        torch.save(saved, folder / f".{STATE}")
        replace_file(folder / f".{STATE}", folder / STATE)

    def _changes_base(self, fit: TransformersFit) -> bool:
        """Returns whether an event has changed the base model, which PEFT does not save."""
        return len(events_of(fit)) > self._repeatable and (hasattr(fit.module, "peft_config") or has_adapters(fit.model))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **hooked: Any) -> None:  # noqa: ANN401
        """Applies events that are due after the last step, and ends training."""
        with self._fitting(args, state, control, hooked) as fit:
            for callback in self.callbacks:
                callback.after_batch(fit)
            for callback in self.callbacks:
                callback.end_training(fit)
            for callback in self.callbacks:
                callback.close(fit)
            for callback in self.callbacks:
                callback.release(fit, completed=True)
            if self._changes_base(fit) and not fit.callbacks(Export):
                rank_zero_warn(
                    "Callbacks: an event has changed the base model of the adapters, which save_model does not save. Use "
                    "bh.Export or bh.save for the result of training."
                )
        self._drop_shape_check()

    @contextmanager
    def _fitting(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        hooked: Mapping[str, Any],
        resumes: bool | None = None,
    ) -> Iterator[TransformersFit]:
        """Yields the run; within, the model's forward pass is without accelerate's autocast."""
        model = hooked["model"]
        resumes = self._fit is not None and self._fit.resumes if resumes is None else resumes
        run = (args, state, model, resumes, self.validation, self._metrics, hooked, control)
        self._fit = fit = TransformersFit(self.callbacks, *run)
        plain = vars(model).get("_original_forward")  # of accelerate, which replaces `forward` for mixed precision
        try:
            with nullcontext() if plain is None else overridden(model, forward=plain):
                yield fit
        except BaseException:
            for callback in self.callbacks:
                callback.release(fit, completed=False)
            self._drop_shape_check()
            raise

    def _drop_shape_check(self) -> None:
        if self._shape_check is not None:
            self._shape_check.remove()

    def _state_of(self, state: TrainerState) -> State:
        """Returns the entry of `trainer_state.json`; raises for several `Callbacks`."""
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__)
        if isinstance(saved, list):
            raise ValueError(
                f"{len(saved)} Callbacks in one Trainer would overwrite each other's state. Pass one, with all callbacks in the "
                "order of their events."
            )
        return {"run": None} if saved is None else saved["attributes"]

    def _restore(self, saved: State) -> None:
        check_callbacks(self.callbacks, saved["callbacks"])
        for callback in self.callbacks:
            if callback.state_key in saved["callbacks"]:
                callback.load_state_dict(saved["callbacks"][callback.state_key])

    def _find(self, args: TrainingArguments, state: TrainerState) -> State:
        """Returns the saved state of the checkpoint that training resumes from."""
        folders = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
        for folder in [*folders, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"]:
            saved = _read(folder)
            # another run may have left a checkpoint of this step; the weights are from the folder that `state` was read from
            if saved is None or (saved["step"], saved["run"]) != (state.global_step, self._state_of(state)["run"]):
                continue
            if saved["base"]:
                raise ValueError(f"an event has changed the base model of the adapters. {_load_from(folder)}")
            return saved
        raise ValueError(
            f"training resumes at step {state.global_step}, but there is no {STATE} of that run and step. Pass the checkpoint "
            "folder as TrainingArguments(resume_from_checkpoint=...) too, or load the model from it with bh.load."
        )


def _load_from(folder: str | Path) -> str:
    """Returns how to load a checkpoint of adapters whose base model has changed."""
    return (
        f"Create the model as PeftModel.from_pretrained(bh.load('{folder}/{BASE}'), '{folder}', is_trainable=True) before the "
        "Trainer is created."
    )


def _refuse_other_shape(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Raises `ValueError` before the Trainer loads a checkpoint into a model of another shape."""
    lora = has_adapters(model)
    adapters = {match[1] for key in state if (match := LORA.search(key))}
    for name, parameter in model.named_parameters():
        saved = state.get(f"{prefix}{name}")
        match = LORA.search(name)
        removed = saved is None and match is not None and match[1] in adapters
        if removed or (saved is not None and saved.shape != parameter.shape):
            advice = "Load the model from the checkpoint folder (bh.load) before the Trainer is created."
            of_shape = "no longer" if saved is None else f"of shape {list(saved.shape)}"
            raise ValueError(
                f"the checkpoint has {name} {of_shape}, and the model {list(parameter.shape)}, because an event changed it. "
                f"{_load_from('FOLDER') if lora else advice}"
            )


def _starts(callback: FitCallback) -> bool:
    """Returns whether all events of a callback are at the start."""
    at = getattr(callback, "at", None)
    return all(entry in ("start", 0) for entry in at) if isinstance(at, list) else at in ("start", 0)


def _read(folder: Path) -> State | None:
    file = folder / STATE
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None
