"""Two processes sum what their examples show, and convert as one does."""

import pytest
import torch
from test_ddp import Fit, FitOfTuples, draw, outcome, run_script

from billhook import KVHeadConversion, MultiStep

SCRIPT = """
from test_ddp import fit_all
from test_kv_head_conversion_ddp import FITS
fit_all(FITS)
"""


def fit(at, **options):
    """On batches of the user's own, two to a process."""
    given = {"calibration": [(one,) for one in draw(4, 2, 12, seed=1)], "measure_batches": 0}
    return Fit(FitOfTuples, lambda: KVHeadConversion(2, at, **given | options), lambda one: one.events, steps=4)


FITS = {
    "layer by layer": fit(MultiStep([0.5, 1.0], [1, 3]), method="svd"),
    "interpolated": fit(3, method="aligned", over=2),
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [{}, str(folder)])
    return folder


@pytest.mark.parametrize("name", FITS)
def test_two_processes_convert_as_one_does(fitted, tmp_path, name):
    state, events = outcome(fitted, name)
    _, single, events_of_one = FITS[name].run(tmp_path, {})
    assert events == events_of_one
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=2e-4, rtol=1e-3, msg=lambda m, own=own: f"{own}: {m}")
