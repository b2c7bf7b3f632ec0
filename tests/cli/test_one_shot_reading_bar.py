"""Commands show one bar of their own while files are read, and none of transformers' or of `datasets`."""

import datasets
import pytest
from transformers.utils import logging

from billhook.cli.main import main


@pytest.fixture
def shows():
    """Transformers' bars are on, as in a new shell."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not before:
        logging.disable_progress_bar()


def test_summary_shows_none_of_transformers_bars(shows, capsys):
    main(["summary", "tiny"])
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("model ")
    assert logging.is_progress_bar_enabled()


def test_commands_show_no_bars_of_datasets_and_leave_them_as_they_were(shows, tmp_path, capsys):
    shown = not datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    (tmp_path / "a.txt").write_text("To be, or not to be.\n" * 40)
    words = ["--sparsity", "0.5", "--data", str(tmp_path / "a.txt"), "--length", "16", "--examples", "2", "--evaluate", "0"]
    main(["prune", "tiny", str(tmp_path / "out"), *words])
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="is not a billhook checkpoint"):
        main(["prune", "tiny", str(tmp_path), *words])
    assert not datasets.are_progress_bars_disabled()
    assert logging.is_progress_bar_enabled()
    if not shown:
        datasets.disable_progress_bars()
