"""Pictures are figures of their own: pyplot and the settings of matplotlib are as before."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from billhook import plots
from billhook.report.speed import Timing
from billhook.shrinking.result import Shrunk

DRAWN = {
    "heads": lambda: plots.heads({"layers.0": torch.rand(4)}, {"layers.0": [1]}, [(0.0, 1.0), (0.25, 1.5)], "val_loss"),
    "pareto": lambda: plots.pareto(Shrunk(None, "bytes", 2, 1, {}, 0.0, {"": 0.0}, (), ())),
    "speed": lambda: plots.speed([Timing(0, "decode", 1, 512, (1.0,), (1.0,), 1, 1, 1, 1, None, None)], ["dense"]),
    "validation": lambda: plots.validation([(0, 3.0), (9, 2.0)], [(4, "event", 2.5, 2.8)], "val_loss"),
}


def test_none_is_left_out():
    assert sorted(DRAWN) == sorted(plots.__all__)


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_outside_of_the_figure_is_touched(name, tmp_path):
    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False), plt.get_fignums()
    figure = DRAWN[name]()
    figure.savefig(tmp_path / "picture.png")
    assert isinstance(figure, Figure)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False), plt.get_fignums()) == before
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebook_shows_it_as_wide_as_it_is():
    figure = DRAWN["heads"]()
    content, told = figure._repr_png_()
    assert content.startswith(b"\x89PNG")
    assert told == {"width": 760}
