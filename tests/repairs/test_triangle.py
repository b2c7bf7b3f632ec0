"""The lower triangle of a sum of products against the whole sum."""

import pytest
import torch

from billhook.repairs import triangle
from billhook.repairs.triangle import Triangle


def added(size, rows=None, monkeypatch=None):
    if rows is not None:
        monkeypatch.setattr(triangle, "ROWS", rows)
    x, found = torch.randn(30, size, dtype=torch.float64), Triangle(size)
    found.add(x[:20], x[:20])
    found.add(x[20:], x[20:])
    return found, x.t() @ x


@pytest.mark.parametrize(("size", "rows"), [(1, 7), (6, 7), (7, 7), (8, 7), (23, 7), (23, 1)])
def test_it_is_the_whole_in_parts(monkeypatch, size, rows):
    found, whole = added(size, rows, monkeypatch)
    torch.testing.assert_close(found.full(), whole)
    assert torch.equal(found.full(), found.full().t())
    torch.testing.assert_close(found.diagonal(), whole.diagonal())
    assert torch.equal(Triangle.of(found.full()).full(), found.full())
    m = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(found.form(m), torch.trace(m @ whole @ m.t()))


@pytest.mark.parametrize(("size", "rows"), [(6, 7), (23, 7)])
def test_the_mean_of_several_is_taken_about_a_centre(monkeypatch, size, rows):
    (one, first), (other, second) = (added(size, rows, monkeypatch) for _ in range(2))
    centre = torch.randn(size, dtype=torch.float64)
    whole = (first + second) / 60
    torch.testing.assert_close(Triangle.mean([one, other], torch.tensor(60)).full(), whole)
    torch.testing.assert_close(Triangle.mean([one, other], torch.tensor(60), centre).full(), whole - centre.outer(centre))
    torch.testing.assert_close(one.full(), first)


def test_it_takes_half_of_the_memory():
    found = Triangle(4096)
    assert sum(panel.nbytes for panel in found.panels) <= 0.63 * 4096**2 * 8
