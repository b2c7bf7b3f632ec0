"""Commands show one bar of their own while files are read, and none of transformers'."""

import pytest
from transformers.utils import logging

from billhook.checkpoints.save import load
from billhook.cli.main import main
from billhook.cli.reading import files


@pytest.fixture
def shows():
    """Transformers' bars are on, as in a new shell."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not before:
        logging.disable_progress_bar()


def _fail_without_bars():
    assert not logging.is_progress_bar_enabled()
    raise OSError("gone")


def test_transformers_own_bar_is_shown_without_it(shows, capsys):
    load("tiny")
    assert "Loading weights" in capsys.readouterr().err


def test_summary_shows_none_of_transformers_bars(shows, capsys):
    main(["summary", "tiny"])
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("model ")
    assert logging.is_progress_bar_enabled()


def test_what_fails_within_leaves_the_bars_as_they_were(shows):
    with pytest.raises(OSError, match="gone"), files("reading"):
        _fail_without_bars()
    assert logging.is_progress_bar_enabled()
