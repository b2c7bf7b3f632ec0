"""The most memory that a piece of work takes, against what it takes."""

import sys

import pytest
import torch

from billhook.report import speed
from billhook.report.speed import Peak

MEGA = 2**20
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the system counts it on Linux only")
def test_the_rise_is_what_was_taken_most_not_what_stays():
    with Peak(CPU) as first:
        torch.ones(64 * MEGA // 4)  # and is freed again
    with Peak(CPU) as second:
        torch.ones(8 * MEGA // 4)
    assert 60 * MEGA < first.rise < 80 * MEGA
    assert second.rise < 20 * MEGA  # the peak of before is forgotten


def test_where_nothing_counts_it_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "RESET", tmp_path / "nowhere" / "clear_refs")
    with Peak(CPU) as found:
        torch.ones(100)
    assert found.rise is None
    with Peak(torch.device("meta")) as found:
        torch.ones(100, device="meta")
    assert found.rise is None
