"""Two processes sum what their examples show, and convert as one does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_ddp import Fit, FitOfTuples, run_script
from torch.utils._pytree import tree_map_only

from billhook import KVHeadConversion, MultiStep

SCRIPT = """
from test_kv_head_conversion_ddp import fit_all
fit_all()
"""


def fit(at, **options):
    """On batches of the user's own, two to a process."""
    ids = torch.randint(3, 60, (4, 2, 12), generator=torch.Generator().manual_seed(1))
    given = {"calibration": [(one,) for one in ids], "measure_batches": 0}
    return Fit(FitOfTuples, lambda: KVHeadConversion(2, at, **given | options), lambda one: one.events, steps=4)


FITS = {
    "layer by layer": fit(MultiStep([0.5, 1.0], [1, 3]), method="svd"),
    "interpolated": fit(3, method="aligned", over=2),
}


def fit_all() -> None:
    """What each of the two processes runs, and whether the outcome is the same on both."""
    (out,) = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name, one in FITS.items():
        run, *result = one.run(Path(out), {}, ranks=2)
        gathered = [None, None]
        torch.distributed.all_gather_object(gathered, repr(tree_map_only(torch.Tensor, torch.Tensor.tolist, result)))
        if run.is_global_zero:
            torch.save([gathered[0] == gathered[1], *result], Path(out, f"{name}.pt"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [str(folder)])
    return folder


@pytest.mark.parametrize("name", FITS)
def test_two_processes_convert_as_one_does(fitted, tmp_path, name):
    alike, state, events = torch.load(fitted / f"{name}.pt", weights_only=True)
    assert alike, "the ranks differ"
    _, single, events_of_one = FITS[name].run(tmp_path, {})
    assert events == events_of_one
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=2e-4, rtol=1e-3, msg=lambda m, own=own: f"{own}: {m}")
