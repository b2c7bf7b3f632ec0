"""Fits that convert KV heads on data, as two processes run them."""

from billhook import KVHeadConversion
from billhook.schedules import MultiStep
from kit.ddp import Fit, FitOfTuples, draw


def fit(at, **options):
    """On batches of the user's own, two to a process."""
    given = {"calibration": [(one,) for one in draw(4, 2, 12, seed=1)], "measure_batches": 0}
    return Fit(FitOfTuples, lambda: KVHeadConversion(2, at, **given | options), lambda one: one.events, steps=4)


FITS = {
    "layer by layer": fit(MultiStep([0.5, 1.0], [1, 3]), method="svd"),
    "interpolated": fit(3, method="aligned", over=2),
}
