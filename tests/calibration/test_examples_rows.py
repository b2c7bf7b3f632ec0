"""Texts to token rows: what is read, what a block holds, what is cached, what is refused."""

import gc
import gzip
import json
import warnings

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from billhook.assets import model_path
from billhook.calibration.examples import DeterministicMasking, classify, map_rows, pack, translate
from billhook.calibration.reading import check_columns, is_line_text, load_splits

DOCUMENTS = ["The first document, of some length.", "A second: shorter.", 'The "third",\nwith a line break & ümlauts.']


@pytest.fixture(autouse=True)
def _collect(request):
    """`datasets` leaves streamed .csv files open; the warning of one that is collected must not hit a later test."""
    yield
    if "csv" in request.node.name:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("tiny"))


def write(folder, name, texts):
    """A file of the kind that its ending says, perhaps compressed."""
    path = folder / name.removesuffix(".gz")
    rows = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(texts), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(list(rows)), encoding="utf-8")
        case ".csv":
            rows.to_csv(path)
        case ".parquet":
            rows.to_parquet(path)
    if name.endswith(".gz"):
        zipped = folder / name
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        return str(zipped)
    return str(path)


def blocks(rows, tokenizer, length=4):
    return map_rows(rows, pack, "train", tokenizer, length=length, columns=["text"], documents=not is_line_text(rows))


def flat(rows):
    return [token for row in rows for token in row["input_ids"]]


def by_hand(tokenizer, documents, length=4):
    ids = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids[: len(ids) // length * length]


NAMES = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "A.v1.txt.jsonl"]


@pytest.mark.daily("a.jsonl-*", "a.parquet-False", "*.gz-True")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_documents_end_with_the_end_token(tmp_path, tokenizer, name, streaming):
    rows = load_splits({"train": write(tmp_path, name, DOCUMENTS)}, streaming)["train"]
    check_columns(rows, "train", "text", "number")
    assert not is_line_text(rows)
    packed = list(blocks(rows, tokenizer))
    assert {len(row["input_ids"]) for row in packed} == {4}
    assert all(set(row) == {"input_ids"} for row in packed)
    assert flat(packed) == by_hand(tokenizer, DOCUMENTS)
    assert flat(packed).count(tokenizer.eos_token_id) >= 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT", "a.v2.txt"])
def test_lines_of_text_run_on(tmp_path, tokenizer, name, streaming):
    lines = ["One line", "and the next,", "", "after an empty one the last"]
    path = tmp_path / name
    path.write_bytes(gzip.compress("\n".join(lines).encode()) if name.endswith(".gz") else "\n".join(lines).encode())
    rows = load_splits({"train": str(path)}, streaming)["train"]
    assert is_line_text(rows)
    ids = tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"]
    packed = flat(blocks(rows, tokenizer))
    assert packed == ids[: len(ids) // 4 * 4]
    assert tokenizer.eos_token_id not in packed


def test_the_remainder_is_left_out(tokenizer):
    ids = tokenizer("one two three four five six", add_special_tokens=False)["input_ids"]
    for size in range(2, len(ids) + 1):
        packed = pack({"text": ["one two three four five six"]}, tokenizer, size, ["text"], False)["input_ids"]
        assert packed == [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    assert pack({"text": ["one"]}, tokenizer, 99, ["text"], True)["input_ids"] == []


def test_null_and_blank_documents_do_not_count(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (None, DOCUMENTS[0], "", " \n", DOCUMENTS[1], None)))
    assert flat(blocks(load_splits({"train": str(path)})["train"], tokenizer)) == by_hand(tokenizer, DOCUMENTS[:2])
    path = tmp_path / "a.csv"
    path.write_text('number,text\n1,"One document, then nothing"\n2,\n3,And another one of these\n')
    expected = by_hand(tokenizer, ["One document, then nothing", "And another one of these"])
    assert flat(blocks(load_splits({"train": str(path)})["train"], tokenizer)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_as_a_data_set(tmp_path, streaming):
    write(tmp_path, "train.jsonl", DOCUMENTS)
    write(tmp_path, "test.jsonl", DOCUMENTS[:1])
    splits = load_splits(str(tmp_path), streaming)
    assert {split: [row["text"] for row in rows] for split, rows in splits.items()} == {"train": DOCUMENTS, "test": DOCUMENTS[:1]}


def test_a_folder_of_text_runs_on(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("One line\nand the next,\nand the last")
    rows = load_splits(str(tmp_path))["train"]
    assert is_line_text(rows)
    ids = tokenizer("One line\nand the next,\nand the last", add_special_tokens=False)["input_ids"]
    assert flat(blocks(rows, tokenizer)) == ids[: len(ids) // 4 * 4]


def test_rows_are_cached(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path, "a.jsonl", DOCUMENTS)

    def encode(length=4, tokenizer=tokenizer):
        return blocks(load_splits({"train": path})["train"], tokenizer, length)

    tokenizer.pad_token = tokenizer.eos_token
    first = encode()
    used = AutoTokenizer.from_pretrained(model_path("tiny"))
    used.pad_token = used.eos_token
    used(["a", "b c d e f"], truncation=True, max_length=2, padding=True)  # leaves its mark in the backend
    calls = []
    monkeypatch.setattr(type(used), "__call__", lambda *_, **__: calls.append(1))
    again = encode(tokenizer=used)
    assert not calls
    assert again._fingerprint == first._fingerprint
    assert again["input_ids"][:] == first["input_ids"][:]
    monkeypatch.undo()
    other = encode(length=6)
    assert other._fingerprint != first._fingerprint
    assert {len(row) for row in other["input_ids"]} == {6}


def test_a_document_ends_with_the_separator_where_there_is_no_end_token():
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    sep = tokenizer.convert_tokens_to_ids("a")
    tokenizer.eos_token, tokenizer.sep_token = None, "a"
    packed = pack({"text": ["One", "Two"]}, tokenizer, 2, ["text"], True)["input_ids"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("One", "Two")]
    assert [token for row in packed for token in row] == [*ids[0], sep, *ids[1], sep][: len(packed) * 2]
    tokenizer.sep_token = None
    packed = pack({"text": ["One", "Two"]}, tokenizer, 2, ["text"], True)["input_ids"]
    assert [token for row in packed for token in row] == [*ids[0], *ids[1]][: len(packed) * 2]


class Bytes:
    """A tokenizer without a Rust backend."""

    eos_token_id, sep_token_id = 1, None

    def __init__(self, shift=3):
        self.shift = shift

    def get_vocab(self):
        return {chr(i): i + self.shift for i in range(128)}

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) + self.shift for c in text] for text in texts]}

    def __repr__(self):
        return "Bytes()"


def test_a_tokenizer_without_backend(tmp_path):
    rows = load_splits({"train": write(tmp_path, "a.jsonl", ["abc", "de"])})["train"]
    assert flat(blocks(rows, Bytes(), 7)) == [100, 101, 102, 1, 103, 104, 1]
    assert blocks(rows, Bytes(), 7)._fingerprint == blocks(rows, Bytes(), 7)._fingerprint
    assert flat(blocks(rows, Bytes(shift=4), 7)) == [101, 102, 103, 1, 104, 105, 1]


def test_classify_and_translate(tokenizer):
    rows = {"a": ["one two three", "four"], "b": ["five", "six"], "label": [1, 0]}
    single = classify(rows, tokenizer, ["a"], "label", 2)
    assert single["input_ids"] == [tokenizer("one two three")["input_ids"][:2], tokenizer("four")["input_ids"][:2]]
    assert single["labels"] == [1, 0]
    pairs = classify(rows, tokenizer, ["a", "b"], "label", 99)
    assert pairs["input_ids"] == tokenizer(rows["a"], rows["b"])["input_ids"]
    translated = translate(rows, tokenizer, ("a", "b"), (2, 1))
    assert translated["input_ids"] == single["input_ids"]
    assert classify(rows, tokenizer, ["a"], "label", 2, {1: 5})["labels"] == [5, 0]
    assert translated["labels"] == [tokenizer(text)["input_ids"][:1] for text in rows["b"]]


@pytest.mark.parametrize("labels", [["yes", "no"], [0.0, 1.0], [0, None]])
def test_labels_must_be_whole_numbers_or_known(tokenizer, labels):
    with pytest.raises(ValueError, match="the column 'label' must hold labels: integers from 0. Got"):
        classify({"a": ["x", "y"], "label": labels}, tokenizer, ["a"], "label", 9)
    with pytest.raises(ValueError, match="integers from 0, or one of perhaps. Got"):
        classify({"a": ["x", "y"], "label": labels}, tokenizer, ["a"], "label", 9, {"perhaps": 0})


def test_texts_must_be_texts(tokenizer):
    with pytest.raises(ValueError, match="'a' must hold text in every row. Got None"):
        classify({"a": ["x", None], "label": [0, 1]}, tokenizer, ["a"], "label", 9)
    with pytest.raises(ValueError, match="'b' must hold text in every row. Got None"):
        translate({"a": ["x"], "b": [None]}, tokenizer, ("a", "b"), (9, 9))
    with pytest.raises(ValueError, match="'text' must hold text in every row. Got 5"):
        pack({"text": [5, 6]}, tokenizer, 2, ["text"], True)


def test_masks_depend_on_the_blocks_alone():
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"), mask_token="<mask>", pad_token="<|endoftext|>")
    given = [{"input_ids": list(range(10 + i, 210 + i))} for i in range(4)]
    first = DeterministicMasking(tokenizer, mlm_probability=0.3)(given)
    torch.manual_seed(1)
    again = DeterministicMasking(tokenizer, mlm_probability=0.3)(given)
    assert all(torch.equal(first[name], again[name]) for name in ("input_ids", "labels"))
    turned = DeterministicMasking(tokenizer, mlm_probability=0.3)(given[::-1])
    assert not torch.equal(turned["labels"] == -100, first["labels"] == -100)


@pytest.mark.daily("*-False")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "missing.txt"}, "the file 'missing.txt' of the split 'train' does not exist"),
        ("missing.jsonl", "the file 'missing.jsonl' of the split 'train' does not exist"),
        ({"train": "empty.txt"}, "the file 'empty.txt' of the split 'train' is empty"),
        ({"train": "a.docx"}, "must be files of one format, with the extension .txt, .md, .json, .jsonl, .parquet, .csv"),
        ({"train": "a.txt.tmp"}, "must be files of one format"),
        ("a.docx", "must be files of one format"),
        ({"train": "a.txt", "validation": "a.jsonl"}, "must be files of one format"),
        ({"train": ["a.txt", "a.jsonl"]}, "must be files of one format"),
        ({"valid": "a.txt"}, "unknown split 'valid'. Use train, validation, test"),
        ({}, "data={} must be a name, a file"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, data, message, streaming):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    for name in ("a.txt", "a.jsonl", "a.docx", "a.txt.tmp"):
        (tmp_path / name).write_text('{"text": "x"}')
    with pytest.raises(ValueError, match=message):
        load_splits(data, streaming)


@pytest.mark.daily("*-False")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"text\n"),
        ("a.csv", b"\n\n"),
        ("a.jsonl", b" \n \n"),
        ("a.json", b"[]"),
        ("a.jsonl", b"no json\n"),
        ("a.parquet", b"no parquet"),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.txt", b"\xff\xfe\xff"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_files_without_rows_or_unreadable(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="or hold no rows|It has no rows|is not encoded as UTF-8"):
        check_columns(load_splits({"train": str(tmp_path / name)}, streaming)["train"], "train", "text")


@pytest.mark.daily("*-False")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_missing_column(tmp_path, name, streaming):
    rows = load_splits({"train": write(tmp_path, name, DOCUMENTS)}, streaming)["train"]
    with pytest.raises(ValueError, match="the split 'train' has no column 'content'. It has text, number"):
        check_columns(rows, "train", "text", "content")
