"""What is read: globs of files, and objects of `datasets`."""

import json
import time

import datasets
import huggingface_hub
import pytest

import billhook as bh
from billhook.calibration.reading import check_available, is_line_text, load_splits
from kit.shards import endpoint


@pytest.fixture
def folder(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_text(json.dumps({"text": "d"}))
    (tmp_path / "deep.jsonl").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"), [("*.jsonl", "abc"), ("[ab].jsonl", "ab"), ("**/*.jsonl", "abcd"), ("deep/*", "d")]
)
def test_globs(folder, pattern, expected):
    splits = load_splits(f"{folder}/{pattern}")
    assert {split: sorted(rows["text"]) for split, rows in splits.items()} == {"train": list(expected)}
    assert list(load_splits({"train": f"{folder}/*.jsonl"})["train"]["text"]) == ["a", "b", "c"]
    several = load_splits({"validation": [f"{folder}/deep/*.jsonl", f"{folder}/a.jsonl"]})
    assert list(several["validation"]["text"]) == ["d", "a"]


def test_a_file_with_brackets_in_its_name(folder):
    (folder / "x[1].jsonl").write_text(json.dumps({"text": "x"}))
    assert list(load_splits({"train": f"{folder}/x[1].jsonl"})["train"]["text"]) == ["x"]


def test_globs_that_match_nothing(folder):
    with pytest.raises(ValueError, match=r"data: no file of the split 'train' matches '.*\*.csv'"):
        load_splits(f"{folder}/*.csv")


@pytest.mark.parametrize("wrong", [5, "", None, 0.5])
@pytest.mark.parametrize("given", [load_splits, bh.TextDataModule, bh.training.ClassificationDataModule])
def test_what_is_no_data_is_refused(given, wrong):
    with pytest.raises(ValueError, match=f"data={wrong!r} must be a name, a file"):
        given(wrong)


def test_calibration_on_a_glob(folder):
    assert list(bh.Calibration([f"{folder}/*.jsonl", "notes.txt"]).named) == [f"{folder}/*.jsonl", "notes"]


def test_files_of_one_split_are_all_named():
    several = {"train": ["texts/a.jsonl", "b.jsonl"], "test": "c.jsonl"}
    assert list(bh.Calibration([several, "notes.txt"]).named) == ["a + b", "notes"]
    assert list(bh.Calibration({"train": [f"{number}.txt" for number in range(9)]}).named) == ["0 + 1 + 2 + 6 more"]


def test_files_that_are_not_utf8_are_named(folder):
    (folder / "latin.txt").write_bytes("schön\n".encode("latin-1"))
    (folder / "utf8.txt").write_text("schön\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data: the file '\S+latin.txt' is not encoded as UTF-8. Save it as UTF-8.$"):
        load_splits({"train": [f"{folder}/utf8.txt", f"{folder}/latin.txt"]})


def test_rows_without_text_are_counted_and_told(folder):
    texts = [" ".join(["word"] * 40), None, "", " \n", " ".join(["text"] * 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = "data: 3 of 5 rows of the split 'train' have no text in the column 'text' and are skipped."
    with pytest.warns(UserWarning, match=told):
        bh.Calibration(f"{folder}/rows.jsonl", tokens=16, length=8, tokenizer="tiny").read(bh.load("tiny"))
    data = bh.TextDataModule(f"{folder}/rows.jsonl", tokenizer="tiny", length=8, validation=0)
    with pytest.warns(UserWarning, match=told):
        data.setup("fit")


def test_chats_and_answers_without_text_are_counted_and_told(folder):
    rows = [{"prompt": "Why?", "response": "So."}, {"prompt": None, "response": "So."}, {"prompt": "Why?", "response": ""}]
    rows += [{"prompt": "", "response": "So."}]  # the prompt is empty, and the response is learnt
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 9))
    with pytest.warns(UserWarning, match="18 of 36 rows of the split 'train' have no text in the column 'prompt' or 'response'"):
        bh.TextDataModule(f"{folder}/answers.jsonl", tokenizer="tiny", length=8, validation=0).setup("fit")


ROWS = datasets.Dataset.from_dict({"text": ["one", "two"]})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        ROWS.with_format("torch"),
        ROWS.to_iterable_dataset(),
        datasets.DatasetDict(train=ROWS, other=ROWS),
        datasets.IterableDatasetDict({"train": ROWS.to_iterable_dataset()}),
    ],
)
def test_objects(data, streaming):
    rows = load_splits(data, streaming)["train"]
    assert [row["text"] for row in rows] == ["one", "two"]
    assert isinstance(rows, datasets.IterableDataset) or not streaming


def test_objects_of_lines_of_text_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    given = datasets.load_dataset("text", data_files=str(tmp_path / "a.txt"))
    assert not is_line_text(load_splits(given)["train"])
    assert is_line_text(given["train"]), "which is left as it was"


def test_objects_without_a_split_that_is_used():
    with pytest.raises(ValueError, match="data: the splits are train_sft. One of train, validation, test is required"):
        load_splits(datasets.DatasetDict(train_sft=ROWS))


def test_what_is_there_is_not_read_and_what_is_not_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n")
    (tmp_path / "empty").mkdir()
    for there in ("tiny", str(tmp_path / "a.txt"), str(tmp_path / "*.txt"), {"train": str(tmp_path / "a.txt")}, str(tmp_path)):
        check_available(there)
    refused = {
        str(tmp_path / "b.txt"): "also: the file '.*' of the split 'train' does not exist",
        str(tmp_path / "b*.txt"): "also: no file of the split 'train' matches",
        str(tmp_path / "empty"): "also='.*' is not an existing file, folder, or readable data set: The directory",
        "nobody/notes": "also='nobody/notes' is not an existing file, folder, or readable data set: Couldn't reach",
    }
    for absent, message in refused.items():
        with pytest.raises(ValueError, match=message):
            check_available(absent, "also")


def test_a_hub_that_cannot_be_reached_is_asked_for_a_data_set_once(tmp_path, monkeypatch):
    def waits(seconds):
        raise AssertionError(f"it waits for {seconds} s")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, value in endpoint("http://127.0.0.1:9").items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(time, "sleep", waits)
    with pytest.raises(ValueError, match=r"data='own/MySet' is not an existing file or folder, and the Hub cannot be reached"):
        check_available("own/MySet")
    (tmp_path / "cache" / "own___my_set").mkdir(parents=True)  # where what was read of it rests
    with pytest.raises(ValueError, match="is not an existing file, folder, or readable data set"):
        check_available("own/MySet")
