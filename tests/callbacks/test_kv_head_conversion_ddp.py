"""Two processes sum what their examples show, and convert as one does."""

import pytest
import torch

from kit.conversion_fits import FITS
from kit.ddp import outcome, run_script

SCRIPT = """
from kit.ddp import fit_all
from kit.conversion_fits import FITS
fit_all(FITS)
"""


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
