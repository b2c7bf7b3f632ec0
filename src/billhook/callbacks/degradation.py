"""The Degradation callback: a comparison with the dense model after each event."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from transformers import PreTrainedModel

from billhook.arguments import check_int, check_types
from billhook.calibration.calibration import Calibration, OtherTexts, check_other_texts, evaluation_batches
from billhook.engine import is_sharded, reshard, source_of
from billhook.fit.calibration import FitCalibration
from billhook.fit.event import Event, EventCallback, EventFollower, State
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.model import tokenizer_of
from billhook.report.degradation import DenseReference, degradation_warning
from billhook.report.generation import generates
from billhook.report.predictions import Comparison, outputs_kind
from billhook.report.verdict import Limits, Verdict, check_compared, check_measured
from billhook.report.writing import DenseWriting


class Degradation(EventFollower):
    """Compares the model with the dense model after each event, as `bh.verdict` does.

    The dense model is the model before any event; it is evaluated in `setup`. The model is evaluated again after each event and
    at the end, on held-out examples of the calibration data, self-generated text, and the texts in `also`. Results, each with
    its paired standard error over examples, go to the loggers (`degradation/SOURCE/perplexity_ratio` and others), the events,
    the table of `Report`, and the record of `Export`. A warning lists out-of-domain texts that degrade more than twice as much
    as the calibration texts. If a limit in `stop` is broken after an event, training ends after the current step; if one is
    broken at the end, `Export` refuses the checkpoint and keeps the weights as unverified.

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
        prompts: Number of texts that the model writes for each of them and temperature. 0 writes none.
        stop: Limits that end training. Defaults to none.

    Raises:
        ValueError: If an argument is not legal. Before training, if the model is neither a causal language model nor an encoder
            of text, the strategy is not supported, a figure with a limit is not measured, or the order of callbacks is wrong.
            After an event at the start that breaks a limit.

    >>> import billhook as bh
    >>> text = bh.Calibration(["generated", "manual.txt"])
    >>> callback = bh.Degradation(text, also="other.txt")  # before Export and Report
    """

    def __init__(
        self,
        texts: Calibration,
        also: OtherTexts = None,
        examples: int = 16,
        prompts: int = 0,
        stop: Limits | None = None,
    ) -> None:
        check_types(Degradation, locals())
        check_int("examples", examples)
        check_int("prompts", prompts, 0)
        check_other_texts(texts, also)
        self.texts = texts
        self.also = also
        self.examples = examples
        self.prompts = prompts
        self.stop = stop
        self.last: list[dict[str, Any]] | None = None
        self.written: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self._dense: DenseReference | None = None
        self._writing: DenseWriting | None = None
        self._begun = False

    def prepare(self, fit: Fit) -> None:
        """Checks the run and evaluates the dense model once it exists."""
        for callback, _ in fit.averages:
            check_listed_after(fit, self, callback)
        self.begin(fit)

    def begin(self, fit: Fit) -> None:
        """Evaluates the dense model once it exists; idempotent."""
        if self._begun:
            return
        fit.check_strategy("Degradation")
        if self.prompts and fit.is_sharded:
            raise ValueError(f"prompts={self.prompts} requires a model that is not sharded. Set prompts to 0.")
        self._begun = True
        self.last, self.written, self.broken = None, [], []
        if self._dense is None or fit.step == 0:  # otherwise an earlier training run continues
            fit.once_model_exists(partial(self._read, fit))

    def _read(self, fit: Fit) -> None:
        model = fit.model
        check_compared("Degradation", model)
        if self.prompts and not generates(model):
            raise ValueError(f"prompts={self.prompts}: {type(model).__name__} predicts no next token. Set prompts to 0.")
        with fail_together(fit, "Degradation"), _undisturbed(fit, model):
            read = evaluation_batches(self.texts, model, self.examples, self.also, fit.tokenizer, generates(model))
            check_identical(fit, "Degradation", "the evaluation examples", [batch["input_ids"] for batch in read])
            if self.stop is not None:
                kind, _ = outputs_kind(model)
                check_measured(self.stop, {source_of(batch) for batch in read}, list(self.texts.named), self.prompts, kind)
            self._dense = DenseReference(model, read, list(self.texts.named), comm_of(fit))
            if self.prompts:
                tokenizer = fit.tokenizer or tokenizer_of(model, None)
                self._writing = DenseWriting(model, self._dense.rows, self.prompts, tokenizer, comm=comm_of(fit))

    def on_event(self, fit: Fit, event: Event) -> None:
        """Evaluates the model after an event; after the last event if several share a step."""
        if any(event is callback.events[-1] for callback in fit.callbacks(EventCallback) if callback.events):
            when = f"after {event['label']}"
            event["degradation"], written = self._measure(fit, when)
            event |= {"written": written} if written else {}
            if self.broken:
                problem = f"Degradation, step {fit.step}, {when}: the model breaks a limit. {'; '.join(self.broken)}"
                if fit.step == 0:  # Lightning would end without end_training
                    raise ValueError(problem)
                rank_zero_warn(f"{problem}. Training ends.")
                fit.stop()

    def end_training(self, fit: Fit) -> None:
        """Evaluates the model at the end of training."""
        if not fit.is_tuning:
            self.last, self.written = self._measure(fit, "end of training")

    def _measure(self, fit: Fit, when: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Evaluates the current model, logs the results, and warns; returns records."""
        assert self._dense is not None
        model = fit.model
        step = fit.step
        with fail_together(fit, "Degradation"), _undisturbed(fit, model):
            degradation = self._dense.degradation(model)
            written = self._writing.compare(model) if self._writing else []
        self.broken = [check.text() for check in Verdict(degradation, written, self.stop or Limits()).broken]
        metrics = dict[str, float]()
        for text in degradation:
            values = {"perplexity": text.after, "perplexity_ratio": text.ratio}
            values |= {name: getattr(text, name) for name in Comparison._fields}
            metrics |= {f"degradation/{text.source}/{name}": value for name, value in values.items() if not math.isnan(value)}
        metrics |= {f"degradation/loops/{texts.temperature:g}": texts.new_loops()[0] for texts in written}
        fit.log_metrics(metrics)
        if warning := degradation_warning(degradation):
            rank_zero_warn(f"Degradation, step {step}, {when}: {warning}")
        return [text.to_json() for text in degradation], [texts.to_json() for texts in written]

    def state_dict(self) -> State:
        """Returns the examples, the dense model's losses and texts, and the results at the end."""
        if self._dense is None:
            return {}
        writing = self._writing.state_dict() if self._writing else {}
        return self._dense.state_dict() | {"last": self.last, "written": self.written, "writing": writing}

    def load_state_dict(self, state_dict: State) -> None:
        """Restores the examples, and the dense model's losses and texts, of the resumed run."""
        if not state_dict or self._dense is None:
            return
        if self._writing is not None and (writing := state_dict.get("writing")):
            self._writing.load_state_dict(writing)
        if not self._dense.load_state_dict(state_dict):
            rank_zero_warn(
                "Degradation: the model before loading the checkpoint, or the texts, differ from those of the resumed run. "
                "Perplexity ratios use the dense perplexities stored in the checkpoint; KL divergence is not measured, nor "
                "are other comparisons of outputs."
            )

    def release(self, fit: Fit, completed: bool) -> None:
        """Lets the next training run evaluate its dense model."""
        self._begun = False


def check_listed_after(fit: Fit, first: object, second: object) -> None:
    """Raises `ValueError` if the first callback is listed before the second."""
    order = list(fit.all_callbacks)
    if order.index(first) < order.index(second):
        raise ValueError(f"{type(first).__name__} must be listed after {type(second).__name__} in Trainer(callbacks=...).")


@contextmanager
def _undisturbed(fit: Fit, model: PreTrainedModel) -> Iterator[None]:
    """Restores training state afterward; meanwhile, the model is on the training device."""
    home = model.device
    device = fit.device
    moves = home != device and not is_sharded(model)
    if moves:
        model.to(device)  # type: ignore[arg-type]
    try:
        with FitCalibration().undisturbed(fit), fit.forward_context():
            yield
    finally:
        reshard(model)
        if moves:
            model.to(home)  # type: ignore[arg-type]
