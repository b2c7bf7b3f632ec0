"""Labels that are words: numbered, kept in the model's config, and exported."""

import datasets
import lightning.pytorch as pl
import pytest
from transformers import AutoConfig

import billhook as bh
from billhook.checkpoints.export import export
from kit.families import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

WORDS = ["good", "bad", "so-so", "bad"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{word}\n" for n, word in enumerate(WORDS)))
    return str(path)


def module(names=None, **options):
    config = llama(vocab_size=4096).config
    if names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    return bh.TransformerModule(config, "sequence-classification", **options)


def fit(classifier, data, **options):
    data = bh.training.ClassificationDataModule(data, "tiny", batch_size=2, validation=0, **options)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, datamodule=data)
    return data


def labels(data):
    return list(data.splits["train"]["labels"])


def test_words_are_numbered_and_named_in_the_config(table):
    classifier = module(num_labels=3)
    data = fit(classifier, table)
    assert labels(data) == [1, 0, 2, 0]
    assert classifier.model.config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    assert classifier.model.config.label2id == {"bad": 0, "good": 1, "so-so": 2}
    assert classifier.model.config.num_labels == 3


def test_a_model_that_knows_the_words_numbers_them(table):
    classifier = module(["so-so", "unheard", "good", "bad"])
    data = fit(classifier, table)
    assert labels(data) == [2, 3, 0, 3]
    assert classifier.model.config.id2label == {0: "so-so", 1: "unheard", 2: "good", 3: "bad"}


def test_another_model_gives_its_own_numbers(table):
    data = bh.training.ClassificationDataModule(table, "tiny", validation=0)
    for names, numbers in ((["so-so", "good", "bad"], [1, 2, 0, 2]), (["bad", "so-so", "good"], [2, 0, 1, 0])):
        data.read(module(names).model)
        assert labels(data) == numbers


def test_names_that_datasets_knows():
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    for names, numbers in ((None, [1, 0, -1]), (["yes", "no"], [0, 1, -1])):
        model, data = module(names).model, bh.training.ClassificationDataModule(rows, "tiny", validation=0)
        data.read(model)
        assert labels(data) == numbers, "the test set of GLUE has -1"
        assert model.config.id2label == dict(enumerate(names or ["no", "yes"]))


def test_another_number_of_classes_is_refused_before_anything_changes(table):
    classifier = module()
    with pytest.raises(
        ValueError, match=r"label_column='label' has 3 labels \(bad, good, so-so\), but the model has 2 classes\. "
    ):
        fit(classifier, table)
    assert classifier.model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_names_are_exported(table, tmp_path):
    class Save(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    data = bh.training.ClassificationDataModule(table, "tiny", batch_size=2, validation=0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Save(), bh.Export(str(tmp_path / "out"), rehearse=False)],
    )  # fmt: skip
    trainer.fit(module(num_labels=3), datamodule=data)
    export(tmp_path / "a.ckpt", tmp_path / "again", "tiny")
    for folder in ("out", "again"):
        assert AutoConfig.from_pretrained(tmp_path / folder).label2id == {"bad": 0, "good": 1, "so-so": 2}


def test_a_split_with_a_word_of_its_own_is_named_too(table, tmp_path):
    (tmp_path / "b.csv").write_text("text,label\na,awful\n")
    data = bh.training.ClassificationDataModule({"train": table, "validation": str(tmp_path / "b.csv")}, "tiny", batch_size=2)
    data.setup("fit")
    assert data.label2id == {"awful": 0, "bad": 1, "good": 2, "so-so": 3}
    assert list(data.splits["validation"]["labels"]) == [0]


def test_a_table_without_validation_gives_some_rows(table):
    data = bh.training.ClassificationDataModule(table, "tiny", batch_size=2, validation=0.25)
    data.setup("fit")
    assert [len(data.splits[split]) for split in ("train", "validation")] == [3, 1]
