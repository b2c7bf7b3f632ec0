"""Event callbacks that can train the smaller model toward the model before the event."""

from abc import ABC

from lightning_utilities.core.rank_zero import rank_zero_info

from billhook.fit.event import Event, EventCallback, ModelChange
from billhook.fit.fit import Fit, Metrics
from billhook.fit.ranks import check_identical, fail_together, from_first_rank
from billhook.repairs.polish import PolishConfig
from billhook.training.polish import check_can_polish, polish
from billhook.training.targets import Targets


class PolishingCallback(EventCallback, ABC):
    """A callback whose events may end with a polish on its calibration data.

    Attributes:
        polish: Settings of the polish; None for none.
    """

    polish: PolishConfig | None = None

    def check_data(self, fit: Fit) -> None:
        """Raises `ValueError` if the calibration data of a coming event cannot be used."""
        super().check_data(fit)
        self.check_polish(fit)

    def check_polish(self, fit: Fit) -> None:
        """Raises `ValueError` if a polish is not possible, or has no calibration data."""
        if self.polish is not None:
            check_can_polish(fit.model)
            self.calibration.check(fit)

    def predictions(self, fit: Fit) -> Targets:
        """Returns the predictions of the model before an event, on all batches on each rank.

        Raises:
            ValueError: If the training step does not call the model as a whole.
        """
        with self.calibration.undisturbed(fit):
            runs = fit.runs(fit.model, self.calibration.read(fit, same_on_ranks=True))
            if any(run.batch is None for run in runs):
                raise ValueError(
                    f"polish: {type(fit.module).__name__} does not call the model as a whole in its training step. Pass batches "
                    "of the model's inputs or a Calibration as calibration=."
                )
            return Targets.of(fit.model, runs)

    def run_change(self, fit: Fit, metrics: Metrics, change: ModelChange) -> Event:
        """Makes a change, and polishes the model; see `record_event`."""
        if self.polish is None:
            return super().run_change(fit, metrics, change)
        who = type(self).__name__
        with fail_together(fit, who):
            dense = self.predictions(fit)
        check_identical(fit, who, "the number of examples", len(dense.examples))
        event = super().run_change(fit, metrics, change)
        with fail_together(fit, who):
            polished = polish(fit.model, dense, how=self.polish)
        for parameter in fit.model.parameters():  # ranks may differ by rounding
            parameter.data.copy_(from_first_rank(fit, who, "the polished weights", parameter))
        event["polish"] = polished.to_json()
        event["what"] += f"; {polished.words}"
        rank_zero_info(f"billhook, step {event['step']}: {polished.text()}")
        return event
