"""Other texts that degradation is measured on: each has a name of its own, whatever kind of source it is."""

import datasets
import pytest

import billhook as bh
from billhook.calibration.calibration import check_other_texts, evaluation_batches

WORDS = [{"text": "To be, or not to be, that is the question. " * 4}] * 4


def table():
    return datasets.Dataset.from_list(WORDS)


def test_objects_get_names_that_no_other_text_has(tmp_path):
    (tmp_path / "other.txt").write_text("Whether it is nobler in the mind to suffer.\n" * 20)
    calibration = bh.Calibration(table(), length=16, tokens=32)
    also = [table(), str(tmp_path / "other.txt"), table()]
    check_other_texts(calibration, also)
    read = evaluation_batches(calibration, bh.load("tiny"), 2, also, generated=False)
    assert list(dict.fromkeys(one.source for one in read)) == ["dataset", "dataset 2", "other", "dataset 3"]
    assert bh.Degradation(calibration, also=also).also is also


def test_a_file_with_the_name_of_another_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="also: 'a' is the name of another text, so their results would be mixed. Rename"):
        check_other_texts(bh.Calibration("x/a.txt"), "y/a.txt")
