"""The picture of what sizes lose."""

from billhook.report.plot_curve import plot_curve


def test_measured_predicted_and_chosen(tmp_path):
    figure = plot_curve("params", [(50, 1.0), (100, 0.0)], [(50, 1.2), (100, 0.0)], (70, 0.3), {"channels": (70, 0.5)})
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[50, 100], [50, 100], [70], [70]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 0.0], [1.2, 0.0], [0.5], [0.3]]
    assert axes.get_xlabel() == "parameters left"
    figure.savefig(tmp_path / "curve.png")
