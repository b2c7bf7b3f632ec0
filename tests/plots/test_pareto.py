"""The picture of what sizes lose."""

import pytest

from billhook import plots
from billhook.shrinking.result import Candidate, Shrunk


def test_measured_predicted_and_chosen(tmp_path):
    curve = Candidate({"a": 1}, 50, 1.2, 1.0), Candidate({"a": 4}, 100, 0.0, 0.0)
    shrunk = Shrunk(None, "params", 75, 70, {"a": (4, 2)}, 0.4, {"a": 0.2, "b": 0.4}, curve, curve)
    figure = plots.pareto(shrunk)
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[50, 100], [50, 100], [100], [75, 75], [70]]
    losses = [list(line.get_ydata()) for line in axes.lines]
    assert losses == [[1.0, 0.0], [1.2, 0.0], [0.0], [0, 1], [pytest.approx(0.3)]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[2:4] == ["dense model", "budget"]
    assert axes.get_xlabel() == "parameters"
    figure.savefig(tmp_path / "curve.png")


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="shrunk='tiny' must be"):
        plots.pareto("tiny")
