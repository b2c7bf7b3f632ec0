"""Sources: how many tokens of each, which rows, chats, what is refused; and methods that read them."""

import json
from pathlib import Path

import datasets
import pytest
import torch

import billhook as bh
from billhook.calibration.calibration import read_batches
from billhook.calibration.reading import load_splits
from billhook.model.preprocessors import tokenizer_of
from kit.families import llama
from kit.losses import BUILD


@pytest.fixture(scope="module")
def model():
    return bh.load("tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory, "other", [f"Line {n} of another text, {n * n}." for n in range(200)])


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    return written(tmp_path_factory, "play", [f"Enter king {n}. Exit queen {n + 1}, with attendants." for n in range(200)])


def written(tmp_path_factory, name, texts):
    path = tmp_path_factory.mktemp("text") / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_shares_rows_and_names(model, file, play):
    given = bh.Calibration([play, file, "generated"], weights=[2, 1, 1], tokens=16 * 32, length=32, batch_size=3)
    batches = given.read(model)
    assert given.examples(32) == {"play": 8, "other": 4, "generated": 4}
    assert [(batch.source, *batch["input_ids"].shape) for batch in batches] == [
        *[("play", 3, 32)] * 2, ("play", 2, 32), ("other", 3, 32), ("other", 1, 32), ("generated", 3, 32), ("generated", 1, 32),
    ]  # fmt: skip


def test_the_packaged_text_is_of_eight_kinds_and_its_splits_share_none(model):
    splits = load_splits("mixed")
    train, rest = splits["train"], splits["validation"]
    assert set(train["kind"]) == set(rest["kind"])
    assert len(set(train["kind"])) == 8
    unseen = load_splits("unseen")["train"]
    assert set(unseen["kind"]) == {"code", "fiction"}
    assert not set(unseen["text"]) & {*train["text"], *rest["text"]}
    texts = [*train["text"], *rest["text"]]
    assert len(set(texts)) == len(texts)
    assert 100_000 < len("".join(texts).encode()) < 200_000
    for kind in set(train["kind"]):  # has its share of the characters
        own = [text for text, of in zip(train["text"], train["kind"], strict=True) if of == kind]
        assert 0.1 < len("".join(own)) / len("".join(train["text"])) < 0.15
    given = bh.Calibration("mixed", tokens=64 * 8, length=64)
    read, left_out = given.read(model), given.held_out(model, 4)
    assert [(batch.source, *batch["input_ids"].shape) for batch in read + left_out] == [("mixed", 1, 64)] * 12
    start = tokenizer_of(model).decode(left_out[0]["input_ids"][0])
    assert any(start[:100] in text for text in rest["text"])
    assert 20 < bh.evaluate(model, "mixed", length=64, examples=4).perplexity < 2048


def test_the_seed_decides_which_rows(model, play):
    one, same, other = (bh.Calibration(play, tokens=64, length=16, seed=seed).read(model) for seed in (0, 0, 1))
    assert [batch["input_ids"].tolist() for batch in one] == [batch["input_ids"].tolist() for batch in same]
    assert [batch["input_ids"].tolist() for batch in one] != [batch["input_ids"].tolist() for batch in other]


def test_each_source_gives_a_row_at_least():
    given = bh.Calibration(["tiny", "generated"], weights=[1000, 1], tokens=64, length=16)
    assert given.examples(16) == {"tiny": 4, "generated": 1}


@pytest.mark.nightly
def test_methods_read_it(model, file, play):
    given = bh.Calibration([play, file], tokens=320, length=32)
    read = given.read(model)
    units = bh.find_units(model, "channel")
    for importance in (bh.OBS(), bh.Taylor()):
        found, expected = (bh.score(model, units, importance, batches) for batches in (given, read))
        assert all(torch.equal(own, expected[name]) for name, own in found.items())
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
    one, other = bh.repair(model, plan, given), bh.repair(model, plan, read)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert bh.prune(model, None, given, 0.5, dry_run=True).to_json() == bh.prune(model, None, read, 0.5, dry_run=True).to_json()


def test_a_text_shorter_than_its_share_gives_all_and_one_without_a_row_is_refused(model, file):
    rows = bh.Calibration(file, tokens=640_000, length=64).read(model)
    ids = torch.cat([row["input_ids"] for row in rows])
    assert 10 < len(ids) < 100
    assert len(ids.unique(dim=0)) == len(ids)
    refusal = rf"'other' has {len(ids)} examples of 64 tokens, and calibration needs 10000, so none is left to hold out"
    with pytest.raises(ValueError, match=refusal):
        bh.Calibration(file, tokens=640_000, length=64).held_out(model, 4)
    with pytest.raises(
        ValueError,
        match="sources: 'other' is too short for an example of length=512 tokens. Use a longer text or a smaller length.$",
    ):
        bh.Calibration(short(file), length=512).read(model)


def short(file):
    path = Path(file).with_name("short") / "other.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("A few words.")
    return str(path)


def test_what_is_held_out_is_not_shown(model, file, play):
    given = bh.Calibration({"train": file, "test": play}, tokens=8 * 32, length=32)
    assert given.named == {"other": {"train": file, "test": play}}
    shown, held_out = given.read(model), given.held_out(model, 5)
    first = bh.Calibration(play, tokens=10**6, length=32).read(model)
    assert [row.source for row in held_out] == ["other"] * 5
    assert all(any(torch.equal(row["input_ids"], one["input_ids"]) for one in first) for row in held_out)
    alone = bh.Calibration([file, "generated"], tokens=16 * 32, length=32)
    shown, held_out = alone.read(model), alone.held_out(model, 5)
    assert [row.source for row in held_out] == ["other"] * 5 + ["generated"] * 5
    every = torch.cat([row["input_ids"] for row in [*shown, *held_out]])
    assert len(every.unique(dim=0)) == 8 + 8 + 5 + 5


TEXTS, PLAYS = ([f"{what} {n}, {n * n} of them." for n in range(200)] for what in ("Line", "King"))
TABLE = datasets.Dataset.from_dict({"text": TEXTS})


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def test_objects_are_read_as_their_files_are(model, tmp_path):
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    splits = datasets.DatasetDict(train=TABLE, test=datasets.Dataset.from_dict({"text": PLAYS}))
    for split, path in files.items():
        splits[split].to_json(path)
    how = {"tokens": 8 * 32, "length": 32}
    given, alone, read = (bh.Calibration(sources, **how) for sources in (splits, TABLE, files))
    assert ids(given.read(model)) == ids(alone.read(model)) == ids(read.read(model))
    assert ids(given.held_out(model, 5)) == ids(read.held_out(model, 5)) != ids(alone.held_out(model, 5))
    assert {batch.source for batch in given.read(model)} == {"dataset"}
    several = bh.Calibration([files, splits, "generated"], weights=[1, 2, 1], **how)
    assert several.examples(32) == {"train": 2, "dataset": 4, "generated": 2}


def test_names_of_objects():
    chats = TABLE.select(range(3))
    chats.info.dataset_name = "chats"
    loaded = TABLE.select(range(4))
    loaded.info.dataset_name = loaded.info.builder_name = "json"  # as where files are loaded
    writes = TABLE.select(range(5))
    writes.info.dataset_name = "generated"
    others = [chats, datasets.DatasetDict(train=chats), loaded, TABLE, writes, "dataset 3.txt", "generated"]
    names = ["chats", "chats 2", "dataset", "dataset 2", "generated 2", "dataset 3", "generated"]
    given = bh.Calibration(others, tokens=64)
    assert list(given.named) == names
    said = given.to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["sources"] == [*names[:5], "dataset 3.txt", "generated"]
    assert (bh.Calibration(TABLE).to_json()["sources"], bh.Calibration("a.txt").to_json()["sources"]) == ("dataset", "a.txt")


def test_without_batches_a_model_that_does_not_write_needs_them():
    with pytest.raises(ValueError, match="batches=None: Bert.* does not generate text .*Pass batches"):
        read_batches(None, BUILD["bert"]())
    with pytest.raises(ValueError, match="batches=None: Linear contains no Hugging Face model"):
        read_batches(None, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("arguments", "said"), [
    ({"sources": []}, r"sources=\[\] is empty. Name at least one"), ({"sources": ["tiny", "tiny"]}, "Name each source once"),
    ({"sources": "a/generated.txt"}, "sources: 'a/generated.txt' has the reserved name 'generated'"),
    ({"sources": ["generated", "a/generated.txt"]}, "'a/generated.txt' has the reserved name 'generated'"),
    ({"weights": [1, 1]}, r"weights=\[1, 1\] must have one number for each of the 1 sources"),
    ({"weights": [0.0]}, "weights=0.0"),
    ({"tokens": 0}, "tokens=0"), ({"length": 1}, "length=1"), ({"batch_size": 0}, "batch_size=0"), ({"sources": 3}, "sources=3"),
    ({"sources": ["tiny", 3]}, "sources=3 must be a name, a file"), ({"sources": {"train": 3}}, "sources={'train': 3} must be"),
    ({"sources": ["a/x.txt", "b/x.txt"]}, "'x' occurs twice. Name each source once"),
    ({"sources": [TABLE, TABLE]}, "occurs twice"),
    ({"sources": TABLE.to_iterable_dataset()}, r"a stream \(IterableDataset\) is not supported, .* Take a part of it"),
    (
        {"sources": datasets.IterableDatasetDict(train=TABLE.to_iterable_dataset())},
        r"a stream \(IterableDatasetDict\) is not supported",
    ),
    ({"sources": datasets.DatasetDict(test=TABLE)}, "the DatasetDict has the splits test. Calibration needs 'train'"),
])  # fmt: skip
def test_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        bh.Calibration(**arguments)


def test_longer_rows_than_the_model_reads_are_refused():
    with pytest.raises(ValueError, match="length=65 exceeds the context length of the model, 64 tokens"):
        bh.Calibration(length=65).read(llama())
