"""The Degradation callback: perplexity and KL divergence after each event."""

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
from billhook.fit.calibration import FitCalibration, find_tokenizer
from billhook.fit.event import Event, EventCallback, EventFollower
from billhook.fit.lightning_internals import averaging_callbacks, is_tuning
from billhook.fit.measure import log_metrics
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.run import callbacks_of, check_strategy, drop_pending, once_model_exists
from billhook.model.find import find_transformer
from billhook.report.degradation import DenseReference, TextDegradation, degradation_warning
from billhook.report.generation import generates


class Degradation(EventFollower):
    """Measures the degradation caused by each event: perplexity ratio and KL divergence.

    The dense model is the model before any event; it is evaluated in `setup`. The model is evaluated again after each event and
    at the end, on held-out examples of the calibration data, self-generated text, and the texts in `also`. Results, each with
    its paired standard error over examples, go to the loggers (`degradation/SOURCE/perplexity_ratio` and others), the events,
    the table of `Report`, and the record of `Export`. A warning lists out-of-domain texts that degrade more than twice as much
    as the calibration texts.

    Training is not affected: random state, modes, and gradients are restored. Each evaluation runs one forward pass over all
    examples. At most 256 MiB of the dense model's predictions are stored, at evenly spaced positions. They are not saved in
    checkpoints: a resumed run computes them again before the checkpoint's weights are loaded. If its model or texts differ, it
    warns and reports perplexity ratios only.

    Put this callback after callbacks that average weights, and before `Export` and `Report`. Under DDP and FSDP2, each rank
    evaluates a share of the examples.

    Args:
        texts: The `Calibration` that the other callbacks use.
        also: Further texts to evaluate on: a file, any other `Calibration` source, or a list of them.
        examples: Number of examples to evaluate from each text.

    Raises:
        ValueError: If an argument is not legal. Before training, if the model does not predict next tokens, the strategy is not
            supported, or the order of callbacks is wrong.

    >>> import billhook as bh
    >>> text = bh.Calibration(["generated", "manual.txt"])
    >>> callback = bh.Degradation(text, also="other.txt")  # before Export and Report
    """

    def __init__(self, texts: Calibration, also: OtherTexts = None, examples: int = 16) -> None:
        check_types(Degradation, locals())
        check_int("examples", examples)
        check_other_texts(texts, also)
        self.texts, self.also, self.examples = texts, also, examples
        self.last: list[dict[str, Any]] | None = None
        self._dense: DenseReference | None = None
        self._begun = False

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return "Damage"  # the class's first name, so that runs resume from checkpoints of that time

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the trainer and evaluates the dense model once it exists."""
        if stage == "fit":
            check_strategy(trainer, "Degradation")
            for callback, _ in averaging_callbacks(trainer):
                check_listed_after(trainer, self, callback)
            self.begin(trainer, pl_module)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the dense model once it exists; idempotent."""
        if self._begun:
            return
        check_strategy(trainer, "Degradation")
        self._begun, self.last = True, None
        if self._dense is None or trainer.global_step == 0:  # otherwise an earlier training run continues
            once_model_exists(pl_module, partial(self._read, trainer, pl_module))

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = find_transformer(pl_module)
        if not generates(model):
            raise ValueError(
                f"Degradation does not support {type(model).__name__}, which does not predict next tokens. Remove the callback."
            )
        with fail_together(trainer, "Degradation"), _undisturbed(trainer, pl_module, model):
            read = evaluation_batches(self.texts, model, self.examples, self.also, find_tokenizer(trainer))
            check_identical(trainer, "Degradation", "the evaluation examples", [batch["input_ids"] for batch in read])
            self._dense = DenseReference(model, read, list(self.texts.named), comm_of(trainer))

    def on_event(self, trainer: pl.Trainer, event: Event) -> None:
        """Evaluates the model after an event; after the last event if several share a step."""
        if any(event is callback.events[-1] for callback in callbacks_of(trainer, EventCallback) if callback.events):
            event["degradation"] = self._measure(trainer, f"after {label_of(event)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the model at the end of training."""
        if not is_tuning(trainer):
            self.last = self._measure(trainer, "end of training")

    def _measure(self, trainer: pl.Trainer, when: str) -> list[dict[str, Any]]:
        """Evaluates the current model, logs the results, and warns."""
        assert self._dense is not None
        pl_module, step = trainer.lightning_module, trainer.global_step
        model = find_transformer(pl_module)
        with fail_together(trainer, "Degradation"), _undisturbed(trainer, pl_module, model):
            degradation = self._dense.degradation(model)
        log_metrics(trainer, _metrics(degradation))
        if warning := degradation_warning(degradation):
            rank_zero_warn(f"Degradation, step {step}, {when}: {warning}")
        return [text.to_json() for text in degradation]

    def state_dict(self) -> dict[str, Any]:
        """Returns the examples, the dense model's losses, and the results at the end."""
        return {} if self._dense is None else self._dense.state_dict() | {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the examples and the dense model's losses of the resumed run."""
        if state_dict and self._dense is not None and not self._dense.load_state_dict(state_dict):
            rank_zero_warn(
                "Degradation: the model before loading the checkpoint, or the texts, differ from those of the resumed run. "
                "Perplexity ratios use the dense perplexities stored in the checkpoint; KL divergence is not measured."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets the next training run evaluate its dense model."""
        self._begun = False
        drop_pending(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Does the same as `teardown`, which Lightning does not call after an error."""
        self.teardown(trainer, pl_module, "fit")


def check_listed_after(trainer: pl.Trainer, first: Callback, second: Callback) -> None:
    """Raises `ValueError` if the first callback is listed before the second."""
    order = callbacks_of(trainer, Callback)
    if order.index(first) < order.index(second):
        raise ValueError(f"{type(first).__name__} must be listed after {type(second).__name__} in Trainer(callbacks=...).")


def _metrics(degradation: list[TextDegradation]) -> dict[str, float]:
    """Returns the values for loggers by name."""
    metrics = dict[str, float]()
    for text in degradation:
        values = {"perplexity": text.after, "perplexity_ratio": text.ratio, "kl": text.kl}
        metrics |= {f"degradation/{text.source}/{name}": value for name, value in values.items()}
    return metrics


@contextmanager
def _undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule, model: PreTrainedModel) -> Iterator[None]:
    """Restores training state afterward; meanwhile, the model is on the training device."""
    home, device = model.device, trainer.strategy.root_device
    moves = home != device and not is_sharded(model)
    if moves:
        model.to(device)  # type: ignore[arg-type]
    try:
        with FitCalibration().undisturbed(pl_module), trainer.precision_plugin.forward_context():
            yield
    finally:
        reshard(model)
        if moves:
            model.to(home)  # type: ignore[arg-type]
