"""The picture of schedules."""

import pytest

import billhook as bh
from billhook import plots

STEPS = 50
NAMED = {
    "once": bh.schedules.Constant(0.5, start=0.2),
    "slowly": bh.schedules.Cubic(0.7, start=0.1, end=0.8, every=5),
    "late": bh.schedules.Linear(0.7, start=20, end=40),
    "in steps": bh.schedules.MultiStep([0.3, 0.5], [10, 30]),
    "round": bh.schedules.Cosine(0.7, start=0.1, end=0.8),
}


def test_the_last_panel_of_each_column_has_labels_at_its_ticks():
    figure = plots.schedules(NAMED, STEPS)
    figure.draw_without_rendering()
    labeled = [any(label.get_visible() for label in axes.get_xticklabels()) for axes in figure.axes]
    assert labeled == [False, True, True, True, True]


def test_each_panel_is_its_schedule_at_every_step():
    figure = plots.schedules(NAMED, STEPS)
    assert [axes.get_title() for axes in figure.axes] == list(NAMED)
    for axes, schedule in zip(figure.axes, NAMED.values(), strict=True):
        bound = schedule.bind(STEPS)
        assert [tuple(point) for point in axes.lines[0].get_xydata()] == [(step, bound(step)) for step in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("named", "steps", "told"),
    [
        ({}, 10, "named={} must have at least one"),
        ({"a": 0.5}, 10, "named="),
        ({"a": NAMED["once"]}, 0, "steps=0"),
        ({"a": NAMED["late"]}, 30, "past the end of training"),
    ],
)
def test_what_cannot_be_drawn_is_refused(named, steps, told):
    with pytest.raises(ValueError, match=told):
        plots.schedules(named, steps)
