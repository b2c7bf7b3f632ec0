"""Tells what events and training cost the model on texts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from transformers import PreTrainedModel

from billhook.arguments import check_int, check_types
from billhook.calibration.calibration import Calibration, OtherTexts, check_other_texts, evaluation_batches
from billhook.checkpoints.card import label_of
from billhook.engine.sharding import is_sharded, reshard
from billhook.fit.calibration import FitCalibration, tokenizer_in
from billhook.fit.event import Event, EventCallback, FollowsEvents
from billhook.fit.lightning_internals import averages, is_search
from billhook.fit.measure import log_figures
from billhook.fit.ranks import check_agreed, comm_of, together
from billhook.fit.run import callbacks_of, check_strategy, drop_waiting, once_model_exists
from billhook.model.find import find_transformer
from billhook.report.damage import Dense, TextDamage, warning_of
from billhook.report.generation import generates


class Damage(FollowsEvents):
    """Tells what each event, and the fit as a whole, costs on texts: perplexity, and KL divergence from the dense model.

    Texts are rows held out of a calibration, some that the model writes, and others. The dense model is the one that the fit is
    given, before any event; it is read in `setup`. It is measured again after each event and at the end, and told as a ratio and
    a divergence, each with its paired standard error over rows: to the loggers (`damage/SOURCE/perplexity_ratio` and others), in
    the events, in `Report`'s table and in what `Export` records. A warning names texts outside of the calibration that lose over
    twice as much as those inside. Training is not disturbed: random numbers, modes and gradients are as before. Each time takes a
    forward of all rows; of the dense model's predictions at most 256 MiB are held, at evenly spaced positions.

    A checkpoint holds the rows, what the dense model loses on them, and what was measured so far. Of the dense model's
    predictions, which would be large, it holds none: a run that is resumed reads them again, before the checkpoint's weights are
    loaded. If its script does not make the same model on the same texts, ratios are still told, of the checkpoint's rows, and the
    divergence is not, with a warning.

    Put it behind callbacks that average weights, and before `Export` and `Report`. Under DDP and FSDP2 each rank reads a share of
    the rows; what is sharded is gathered as in training.

    Args:
        texts: What the model is calibrated on, the same `Calibration` that other callbacks are given.
        also: Other texts: a file, or any other source of a `Calibration`, or several.
        rows: How many rows of each text are read.

    Raises:
        ValueError: If an argument is not legal; before training, if the model does not predict next tokens, the strategy is
            none that callbacks know, or a callback stands on the wrong side.

    >>> import billhook as bh
    >>> text = bh.Calibration(["generated", "manual.txt"])
    >>> callback = bh.Damage(text, also="other.txt")  # before Export and Report
    """

    def __init__(self, texts: Calibration, also: OtherTexts = None, rows: int = 16) -> None:
        check_types(Damage, locals())
        check_int("rows", rows)
        check_other_texts(texts, also)
        self.texts, self.also, self.rows = texts, also, rows
        self.last: list[dict[str, Any]] | None = None
        self._dense: Dense | None = None
        self._begun = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the trainer, and reads the dense model once it exists."""
        if stage == "fit":
            check_strategy(trainer, "Damage")
            for callback, _ in averages(trainer):
                refuse_before(trainer, self, callback)
            self.begin(trainer, pl_module)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the dense model once it exists; a callback whose events come before the fit asks for it earlier."""
        if self._begun:
            return
        check_strategy(trainer, "Damage")
        self._begun, self.last = True, None
        if self._dense is None or trainer.global_step == 0:  # otherwise the fit before continues
            once_model_exists(pl_module, partial(self._read, trainer, pl_module))

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = find_transformer(pl_module)
        if not generates(model):
            raise ValueError(
                f"Damage: a {type(model).__name__} does not predict next tokens, so it has no perplexity: leave it out"
            )
        with together(trainer, "Damage"), _aside(trainer, pl_module, model):
            read = evaluation_batches(self.texts, model, self.rows, self.also, tokenizer_in(trainer))
            check_agreed(trainer, "Damage", "the rows of text", [batch["input_ids"] for batch in read])
            self._dense = Dense(model, read, list(self.texts.named), comm_of(trainer))

    def after(self, trainer: pl.Trainer, event: Event) -> None:
        """Measures the model after an event; of several at once, after the last."""
        if any(event is callback.events[-1] for callback in callbacks_of(trainer, EventCallback) if callback.events):
            event["damage"] = self._measure(trainer, f"after {label_of(event)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the model at the end."""
        if not is_search(trainer):
            self.last = self._measure(trainer, "at the end")

    def _measure(self, trainer: pl.Trainer, when: str) -> list[dict[str, Any]]:
        """Measures the model as it is, gives loggers the figures, and warns."""
        assert self._dense is not None
        pl_module, step = trainer.lightning_module, trainer.global_step
        model = find_transformer(pl_module)
        with together(trainer, "Damage"), _aside(trainer, pl_module, model):
            damage = self._dense.damage(model)
        log_figures(trainer, _figures(damage))
        if warning := warning_of(damage):
            rank_zero_warn(f"Damage, step {step}, {when}: {warning}")
        return [text.to_json() for text in damage]

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows of text, what the dense model loses on them, and what was measured at the end."""
        return {} if self._dense is None else self._dense.state_dict() | {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the rows of the run that is resumed."""
        if state_dict and self._dense is not None and not self._dense.load_state_dict(state_dict):
            rank_zero_warn(
                "Damage: before the checkpoint's weights were loaded, the model was not the dense one of the run that goes on, "
                "or the texts are others: perplexities are compared with those in the checkpoint, and no divergence is told"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the model again in the next fit."""
        self._begun = False
        drop_waiting(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Reads the model again in the next fit (Lightning does not call `teardown` then)."""
        self.teardown(trainer, pl_module, "fit")


def refuse_before(trainer: pl.Trainer, first: Callback, second: Callback) -> None:
    """Refuses a callback that stands before another in the list."""
    order = callbacks_of(trainer, Callback)
    if order.index(first) < order.index(second):
        raise ValueError(f"{type(first).__name__} must stand behind {type(second).__name__} in the list of callbacks")


def _figures(damage: list[TextDamage]) -> dict[str, float]:
    """Returns what loggers are given."""
    names = {"perplexity": "after", "perplexity_ratio": "ratio", "kl": "kl"}
    return {f"damage/{text.source}/{name}": getattr(text, figure) for text in damage for name, figure in names.items()}


@contextmanager
def _aside(trainer: pl.Trainer, pl_module: pl.LightningModule, model: PreTrainedModel) -> Iterator[None]:
    """Leaves no trace in the training; before the strategy has moved the model, it is on the device meanwhile."""
    home, device = model.device, trainer.strategy.root_device
    moves = home != device and not is_sharded(model)
    if moves:
        model.to(device)  # type: ignore[arg-type]
    try:
        with FitCalibration().aside(pl_module), trainer.precision_plugin.forward_context():
            yield
    finally:
        reshard(model)
        if moves:
            model.to(home)  # type: ignore[arg-type]
