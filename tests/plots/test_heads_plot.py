"""The picture of heads: written, given to loggers, and of whatever scores there are."""

import struct

import pytest
import torch

import billhook as bh
from billhook import plots
from kit.fits import data, trainer
from kit.head_pruning import module, pruning


def size_of(path):
    """Width and height of a PNG."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_the_last_round_is_drawn_to_a_file(files, tmp_path):
    path = tmp_path / "pictures" / "report.png"
    callback = pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 4]), remove="rounds", measure_batches=2)
    first = bh.WeightPruning(bh.Magnitude(), sparsity=0.1, measure_batches=0)  # an event without a picture
    trainer(tmp_path, [first, callback, bh.Report(str(path))], max_steps=5).fit(module(), data(files))
    assert size_of(path.with_name("report_heads.png")) == (1425, 480)
    heads, curve, _ = callback.plots()["heads"].axes
    assert heads.get_title() == "8 of 16 heads removed"
    shares, losses = curve.lines[0].get_data()
    assert list(shares) == [0, 25, 25, 50]  # before and after each round
    assert list(losses) == [event[when]["val_loss"] for event in callback.events for when in ("before", "after")]
    assert [text.get_text() for text in curve.get_legend().get_texts()] == ["pruning", "training"]
    assert curve.get_ylabel() == "validation loss"


class TestPlot:
    def draw(self, path, *arguments, **options):
        figure = plots.heads(*arguments, **options)
        figure.savefig(path / "heads.png")
        width, height = size_of(path / "heads.png")
        assert 600 <= width <= 1500
        assert 450 <= height <= 2200
        return figure

    def test_layers_with_different_numbers_of_heads_and_no_scores(self, tmp_path):
        scores = {
            "decoder.0.self.attn": torch.tensor([0.1, torch.nan, 0.3]),
            "decoder.1.self.attn": torch.tensor([0.5]),
            "decoder.1.cross.attn": torch.full([2], torch.nan),
        }
        gone = {"decoder.0.self.attn": [1], "decoder.1.cross.attn": [0, 1]}
        figure = self.draw(tmp_path, scores, gone)
        heads, bar = figure.axes
        assert (heads.get_title(), heads.get_ylabel()) == ("3 of 6 heads removed", "layer")
        assert [label.get_text() for label in heads.get_yticklabels()] == ["0.self", "1.self", "1.cross"]
        assert [list(map(list, line.get_data())) for line in heads.lines] == [[[1, 0, 1], [0, 2, 2]]]
        table = heads.images[0].get_array()
        assert table.shape == (3, 3)
        assert table.mask.tolist() == [[False, True, False], [False, True, True], [True] * 3]
        assert bar.get_ylabel() == "importance"

    @pytest.mark.parametrize("scores", [[0.2, 0.1], [-0.2, -0.1], [-0.2, 0.3]])
    def test_the_scale_begins_at_zero_or_below(self, tmp_path, scores):
        least, most = self.draw(tmp_path, {"layers.0": torch.tensor(scores)}, {}).axes[0].images[0].get_clim()
        assert (least, most) == (pytest.approx(min(0.0, *scores)), pytest.approx(max(scores)))

    @pytest.mark.parametrize("curve", [[(0.0, 2.0)], [(0.0, 2.0), (0.25, float("nan")), (0.5, 3.0)]])
    def test_curves(self, tmp_path, curve):
        figure = self.draw(tmp_path, {"a.0": torch.rand(4), "a.1": torch.rand(4)}, {"a.0": [2]}, curve, "val_loss")
        assert len(figure.axes) == 3
        assert figure.axes[1].get_xlabel() == "heads removed, %"

    def test_heads_that_are_only_masked(self, tmp_path):
        figure = self.draw(tmp_path, {"a.0": torch.rand(4)}, {"a.0": [2]}, [(0.0, 2.0), (0.25, 3.0)], "val_loss", masked=True)
        assert figure.axes[0].get_title() == "1 of 4 heads masked"
        assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["head (x: masked)", "heads masked, %"]
        assert len(figure.axes[1].lines) == 1
        assert figure.axes[1].lines[0].get_linestyle() == "None"  # two points make no line, but an arrow
        assert len(figure.axes[1].texts) == 1
