"""The picture of a validation figure over steps."""

import copy
import math
import struct
from pathlib import Path

import pytest

from billhook import plots

HISTORY = [(0, 39.3), (20, 42.5), (40, 114), (60, 91), (80, 74), (100, 62), (240, 46.9)]
EVENT = (20, "8 -> 1 KV heads (mean)", 42.5, 1139.0)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


CASES = {
    "one event": (HISTORY, [EVENT]),
    "three events": (HISTORY, [EVENT, (100, "4 -> 2 KV heads (mean)", 62, 300), (240, "2 -> 1 KV heads (mean)", 46.9, 800)]),
    "nothing": ([], []),
    "no figures": ([], [(5, "8 -> 1 KV heads (mean)", None, None)]),
    "not finite": (
        [(0, 40.0), (10, math.inf), (20, math.nan), (30, 50.0)],
        [(10, "a", 41.0, math.inf), (20, "b", math.nan, 1e9)],
    ),
    "never finite": ([(0, math.nan), (1, math.inf)], [(1, "a", math.inf, -math.inf)]),
    "$names$": ([(0, 1.0)], [(0, "100 % of $x_1 _ \\frac$", 1.0, 2.0)]),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_whatever_a_run_gives(case, tmp_path):
    history, events = CASES[case]
    before = copy.deepcopy(CASES[case])
    plots.validation(history, events, "val_perplexity", history[0][1] if history else None).savefig(tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1200, 675)
    assert before == CASES[case]


def drawn(*arguments):
    figure = plots.validation(*arguments)
    figure.draw_without_rendering()
    return figure.axes[0]


def test_says_the_values_in_plain_numbers():
    axes = drawn(HISTORY, [EVENT], "val_perplexity", 39.3)
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "validation perplexity"
    assert {"50", "100", "1,000"} <= {tick.get_text() for tick in axes.get_yticklabels()}
    assert {text.get_text().strip() for text in axes.texts} == {"39.3", "42.5", "1,139", "46.9", "dense", EVENT[1]}
    assert any(list(line.get_ydata()) == [39.3, 39.3] for line in axes.lines)
    assert drawn([(0, 0.9), (1, 0.1)], [], "val_accuracy").get_yscale() == "linear"


def test_labels_do_not_lie_on_each_other_or_on_the_curve():
    events = [(20, "8 -> 4 KV heads (mean)", 42.5, 130), (30, "4 -> 2 KV heads (mean)", 60, 310), EVENT[:1] + EVENT[1:]]
    axes = drawn(HISTORY, [*events[:2], (180, "2 -> 1 KV heads (mean)", 52, 800)], "val_perplexity")
    extents = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    names = [text.get_window_extent() for text in axes.texts if "KV" in text.get_text()]
    assert len(names) == 3
    assert all(extent.y0 > axes.bbox.y1 for extent in names)
    assert all(axes.figure.bbox.x0 <= extent.x0 <= extent.x1 <= axes.figure.bbox.x1 for extent in extents)


def test_labels_stand_beside_their_own_points():
    """Two of almost one value, one just after the other."""
    history = [(0, 38.3), (20, 228), (100, 58), (300, 42.6)]
    axes = drawn(history, [(10, "8 -> 1 KV heads (mean)", 38.8, 1270)], "val_perplexity")
    dots = {"38.3": (0, 38.3), "38.8": (10, 38.8), "1,270": (10, 1270), "42.6": (300, 42.6)}
    places = {name: axes.transData.transform(dot) for name, dot in dots.items()}
    for text in axes.texts:
        if (name := text.get_text()) in dots:
            extent = text.get_window_extent()
            center = ((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)
            assert min(places, key=lambda other: math.dist(places[other], center)) == name
    assert {text.get_text() for text in axes.texts} >= dots.keys()
