"""The picture of `billhook bench`, against the figures that it is drawn from."""

import pytest

from billhook import plots
from billhook.report.speed import Timing

NAMES = ["dense", "mqa"]


def row(model, phase, context, seconds, ratios, ideal):
    return Timing(model, phase, 16, context, seconds, ratios, 10, 4, 2052, 30, ideal, None)


ROWS = [
    row(0, "decode", 512, (0.01, 0.02, 0.04), (1.0, 1.0, 1.0), 1.0),
    row(1, "decode", 512, (0.01, 0.01, 0.02), (1.0, 2.0, 2.0), 1.5),
    row(0, "decode", 2048, (0.04, 0.04, 0.08), (1.0, 1.0, 1.0), 1.0),
    row(1, "decode", 2048, (0.01, 0.02, 0.02), (4.0, 2.0, 4.0), 2.5),
]


def lines(axes):
    """Points of each line that joins some."""
    return [tuple(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_linestyle() in ("-", "--")]


def bars(axes):
    """Lower and upper ends of the bars of each model."""
    return [[tuple(end[1] for end in bar) for bar in held.lines[2][0].get_segments()] for held in axes.containers]


def test_speeds_speed_ups_and_their_quartiles():
    figure = plots.speed(ROWS, NAMES)
    speeds, ratios = figure.axes
    assert lines(speeds) == [((512, 800), (2048, 400)), ((512, 1600), (2048, 800))]  # 16 tokens in the median round
    assert bars(speeds)[0] == [pytest.approx((16 / 0.03, 16 / 0.015)), pytest.approx((16 / 0.06, 16 / 0.04))]
    assert {((512, 2.0), (2048, 4.0)), ((512, 1.5), (2048, 2.5))} <= set(lines(ratios))
    assert bars(ratios) == [[(1.5, 2.0), (3.0, 4.0)]]
    assert [axes.get_title() for axes in figure.axes] == ["decode", "decode: speedup over dense (dashed: ideal)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense, batch 16", "mqa, batch 16"]


def test_a_row_of_panels_for_each_phase_and_no_speed_up_of_a_single_model(tmp_path):
    alone = [row(0, phase, 512, (1.0,), (1.0,), None) for phase in ("prefill", "decode")]
    figure = plots.speed(alone, ["dense"])
    assert [axes.get_title() for axes in figure.axes] == ["prefill", "decode"]
    figure.savefig(tmp_path / "o.png")
    assert len(plots.speed([*alone, *ROWS[1:2]], NAMES).axes) == 4
