"""The data modules: splits to batches, and what they refuse."""

import json

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import billhook as bh
from billhook import TextDataModule, TransformerModule
from billhook.assets import model_path
from billhook.training import ClassificationDataModule
from billhook.training.data import Seq2SeqDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # there is no validation
]

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def table(tmp_path):
    """Rows of two texts and a label."""
    path = tmp_path / "table.jsonl"
    texts = ["a cat", "two small cats and a dog", "birds", "the old house on the hill", "rain"]
    rows = [{"text": text, "other": f"no {text}", "label": i % 3} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def batches(data, loader="train_dataloader"):
    data.setup("fit")
    loaders = getattr(data, loader)()
    return [batch for one in (loaders if isinstance(loaders, list) else [loaders]) for batch in one]


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_text_batches(text, tokenizer):
    data = TextDataModule({"train": text, "validation": text}, "tiny", length=16, batch_size=3)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    blocks = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    validation = batches(data, "val_dataloader")
    assert [block for batch in validation for block in batch["input_ids"].tolist()] == blocks
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in validation)
    assert all(set(batch) == {"input_ids", "labels"} for batch in validation)
    train = batches(data)
    assert len(blocks) % 3 != 0, "the test needs a remainder"
    assert len(train) == len(blocks) // 3
    assert all(batch["input_ids"].shape == (3, 16) for batch in train)
    seen = [tuple(block) for batch in train for block in batch["input_ids"].tolist()]
    assert seen != [tuple(block) for block in blocks][: len(seen)]
    assert set(seen) <= {tuple(block) for block in blocks}


def test_streaming_gives_the_same_blocks(text):
    def make(streaming):
        return TextDataModule({"validation": text}, "tiny", length=16, batch_size=3, streaming=streaming)

    prepared, streamed = (batches(make(streaming), "val_dataloader") for streaming in (False, True))
    assert len(prepared) == len(streamed) > 1
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(prepared, streamed, strict=True))


@pytest.mark.slow
def test_the_embedded_text():
    data = TextDataModule(tokenizer="tiny", length=32)
    data.setup("fit")
    assert set(data.splits) == {"train", "validation"}
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (8, 32)


def test_another_column(table, tokenizer):
    data = TextDataModule({"validation": table}, "tiny", length=2, batch_size=1, column="other")
    first = [token for batch in batches(data, "val_dataloader") for token in batch["input_ids"][0].tolist()]
    ids = tokenizer("no a cat", add_special_tokens=False)["input_ids"]
    assert first[: len(ids) + 1] == [*ids, tokenizer.eos_token_id]


def test_splits_and_what_stands_in_for_them(text, table):
    data = TextDataModule({"train": text}, "tiny", length=16)
    assert batches(data, "val_dataloader") == []
    assert batches(data, "test_dataloader") == []
    data = TextDataModule({"train": text, "validation": text}, "tiny", length=16)
    assert len(batches(data, "test_dataloader")) == len(batches(data, "val_dataloader")) > 0
    data = ClassificationDataModule({"train": table, "validation": table, "test": [table, table]}, "tiny", batch_size=5)
    assert len(batches(data, "test_dataloader")) == len(batches(data, "predict_dataloader")) == 2
    with pytest.raises(ValueError, match="data has no split 'train'. Splits: validation"):
        batches(TextDataModule({"validation": text}, "tiny", length=16))


@pytest.fixture
def masking(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"), mask_token="<mask>")
    folder = tmp_path / "masking"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_masked_language_modelling(text, masking, streaming):
    options = {"length": 32, "batch_size": 4, "mlm_probability": 0.4, "streaming": streaming}
    data = TextDataModule({"train": text, "validation": text}, masking, **options)
    plain = TextDataModule({"validation": text}, masking, length=32, batch_size=4)
    masked, whole = batches(data, "val_dataloader"), batches(plain, "val_dataloader")
    mask = data.tokenizer.mask_token_id
    counted = torch.cat([(batch["labels"] != -100).flatten() for batch in masked])
    assert 0.3 < counted.float().mean() < 0.5
    for batch, original in zip(masked, whole, strict=True):
        labelled = batch["labels"] != -100
        assert torch.equal(batch["labels"][labelled], original["input_ids"][labelled])
        assert torch.equal(batch["input_ids"][~labelled], original["input_ids"][~labelled])
        assert (batch["input_ids"] == mask).any()
        assert not (batch["input_ids"] == mask)[~labelled].any()
    again = batches(data, "val_dataloader")
    assert all(torch.equal(a[name], b[name]) for a, b in zip(masked, again, strict=True) for name in ("input_ids", "labels"))


def test_a_tokenizer_without_a_mask(text):
    data = TextDataModule({"train": text}, "tiny", length=16, mlm_probability=0.1)
    with pytest.raises(ValueError, match="mlm_probability=0.1 requires a tokenizer with a mask token"):
        batches(data)


def test_classification(table, tokenizer):
    data = ClassificationDataModule({"validation": table}, "tiny", batch_size=4, length=3)
    first, last = batches(data, "val_dataloader")
    assert first["labels"].tolist() == [0, 1, 2, 0]
    assert last["labels"].tolist() == [1]
    short, long = tokenizer("a cat")["input_ids"], tokenizer("two small cats and a dog")["input_ids"]
    assert first["input_ids"][1].tolist() == long[:3]
    assert first["input_ids"][0, : len(short)].tolist() == short[:3]
    assert first["attention_mask"].sum(1).tolist()[:2] == [min(3, len(short)), 3]
    assert set(first) >= {"input_ids", "attention_mask", "labels"}


def test_classification_of_pairs_pads_to_the_longest(table, tokenizer):
    data = ClassificationDataModule({"validation": table}, "tiny", text_columns=["text", "other"], batch_size=5)
    (batch,) = batches(data, "val_dataloader")
    texts = ["a cat", "two small cats and a dog", "birds", "the old house on the hill", "rain"]
    pairs = [tokenizer(text, f"no {text}")["input_ids"] for text in texts]
    assert batch["input_ids"].shape == (5, max(map(len, pairs)))
    for row, mask, pair in zip(batch["input_ids"], batch["attention_mask"], pairs, strict=True):
        assert row[mask.bool()].tolist() == pair
        assert set(row[~mask.bool()].tolist()) <= {data.tokenizer.pad_token_id}


def test_sequence_to_sequence(table, tokenizer):
    data = Seq2SeqDataModule(
        {"validation": table},
        "tiny",
        source_column="text",
        target_column="other",
        max_source_length=4,
        max_target_length=5,
        batch_size=5,
    )
    (batch,) = batches(data, "val_dataloader")
    targets = [tokenizer(f"no {text}")["input_ids"][:5] for text in ("a cat", "two small cats and a dog", "birds")]
    assert batch["input_ids"].shape[1] == 4
    assert batch["labels"].shape[1] == 5
    assert batch["labels"][1].tolist() == targets[1]
    for labels, target in zip(batch["labels"], targets, strict=False):
        assert labels.tolist() == target + [-100] * (5 - len(target))
    assert (batch["labels"] == -100).any(), "the test needs a target that is padded"


def test_the_tokenizer_beside_the_model(text):
    class Keep(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.vocabulary = trainer.datamodule.tokenizer.vocab_size

    keep = Keep()
    module = TransformerModule("tiny")
    data = TextDataModule({"train": text}, length=16, batch_size=2)
    trainer(max_steps=1, callbacks=[keep]).fit(module, datamodule=data)
    assert keep.vocabulary == module.model.config.vocab_size
    assert data.tokenizer.name_or_path == model_path("tiny")


def test_predicting(text):
    config = LlamaConfig(vocab_size=4096, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    data = TextDataModule({"test": text}, "tiny", length=16, batch_size=3)
    logits = trainer().predict(TransformerModule(config), datamodule=data)
    assert sum(len(batch) for batch in logits) == len(data.splits["test"])
    assert logits[0].shape == (3, 16, 4096)


def test_the_pad_token_is_the_end_token_where_there_is_none(table):
    data = ClassificationDataModule({"train": table}, "tiny")
    assert data.tokenizer.pad_token == data.tokenizer.eos_token == "<|endoftext|>"


def test_a_tokenizer_that_cannot_pad(table, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"), eos_token=None, pad_token=None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "plain")
    data = ClassificationDataModule({"train": table}, str(tmp_path / "plain"), batch_size=2)
    with pytest.raises(ValueError, match="the tokenizer does not have a padding token"):
        batches(data)


@pytest.mark.parametrize(
    ("task", "config", "kind", "match"),
    [
        ("causal-lm", LlamaConfig, Seq2SeqDataModule, "cannot train LlamaForCausalLM, which is not an encoder-decoder"),
        ("causal-lm", LlamaConfig, ClassificationDataModule, "cannot train LlamaForCausalLM, which predicts tokens"),
        ("sequence-classification", LlamaConfig, TextDataModule, "cannot train LlamaForSequenceClassification, which does"),
    ],
)
def test_batches_that_the_model_does_not_take(text, task, config, kind, match):
    sizes = {"vocab_size": 4096, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = TransformerModule(config(**sizes), task)
    with pytest.raises(ValueError, match=match):
        trainer(max_steps=1).fit(module, datamodule=kind({"train": "nowhere.jsonl"}, "tiny"))


def test_a_module_without_a_name_needs_a_tokenizer(text):
    with pytest.raises(ValueError, match="tokenizer=None: the model in training has no name .* Pass tokenizer="):
        batches(TextDataModule({"train": text}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextDataModule(length=1), "length=1 must be a whole number of at least 2"),
        (lambda: TextDataModule(batch_size=0), "batch_size=0 must be a whole number of at least 1"),
        (lambda: TextDataModule(mlm_probability=1.0), r"mlm_probability=1.0 must be in \[0, 1\)"),
        (lambda: TextDataModule(mlm_probability=-0.1), "mlm_probability=-0.1 must be"),
        (lambda: ClassificationDataModule("x", text_columns=["a", "b", "c"]), r"text_columns=\['a', 'b', 'c'\] must be one"),
        (lambda: ClassificationDataModule("x", batch_size=0), "batch_size=0"),
        (lambda: ClassificationDataModule("x", length=0), "length=0 must be a whole number of at least 1"),
        (lambda: Seq2SeqDataModule("x", batch_size=-1), "batch_size=-1"),
        (lambda: Seq2SeqDataModule("x", max_source_length=0), "max_source_length=0 must be a whole number of at least 1"),
        (lambda: Seq2SeqDataModule("x", max_target_length=0), "max_target_length=0 must be a whole number of at least 1"),
    ],
)
def test_arguments_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "length", "batch_size", "match"),
    [
        (TEXT, 5000, 1, "length=5000 is longer than the text of the split 'train'|batch_size=1: "),
        (TEXT, 16, 500, "batch_size=500(: the stream ended| is too large: the split 'train' has)"),
        ("\n" * 500, 2, 1, "length=2 is longer than the text|the stream ended before"),
    ],
    ids=["a long block", "a large batch", "blank text"],
)
def test_text_that_fills_no_batch(tmp_path, content, length, batch_size, match, streaming):
    path = tmp_path / "train.txt"
    path.write_text(content)
    data = TextDataModule({"train": str(path)}, "tiny", length=length, batch_size=batch_size, streaming=streaming)
    with pytest.raises(ValueError, match=match):
        batches(data)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (TextDataModule, {"column": "content"}, "no column 'content', no chats .* It has text, other, label"),
        (TextDataModule, {"column": "content", "streaming": True}, "no column 'content', no chats .* It has text, other, label"),
        (ClassificationDataModule, {"text_columns": ["text", "third"]}, "no column 'third'"),
        (ClassificationDataModule, {"label_column": "grade"}, "no column 'grade'"),
        (Seq2SeqDataModule, {}, "no column 'source'"),
    ],
)
def test_missing_columns(table, kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind({"train": table}, "tiny", **options).setup("fit")


def test_a_tokenizer_with_tokens_that_the_model_has_lost(text, tokenizer, tmp_path):
    model = bh.load("tiny", "float32")
    plan = bh.plan(model, batches=[{"input_ids": torch.arange(300, 400)[None]}], tokens=0.25)
    plan.trim_tokenizer(tokenizer).save_pretrained(tmp_path / "left")
    bh.apply(model, plan)
    module = TransformerModule(model)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    for name in (None, "tiny"):
        with pytest.raises(ValueError, match="it has 2,048 tokens, but the model only 1,536.* pass plan.trim_tokenizer"):
            pl.Trainer(max_steps=1, accelerator="cpu", **quiet).fit(module, TextDataModule(text, name, length=16, batch_size=2))
    data = TextDataModule(text, str(tmp_path / "left"), length=16, batch_size=2)
    pl.Trainer(max_steps=1, accelerator="cpu", **quiet).fit(module, data)


def test_generated_text_is_the_teachers_and_leaves_random_numbers_alone(tmp_path):
    """A teacher of other weights is asked, not the model in training."""
    teacher = bh.load("tiny")
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    teacher.config.max_position_embeddings = 48  # short texts take less time
    bh.save(teacher, tmp_path / "teacher", tokenizer=AutoTokenizer.from_pretrained(model_path("tiny")))
    module = TransformerModule("tiny", distillation=bh.training.Distillation(teacher=str(tmp_path / "teacher")))
    data = TextDataModule(["tiny", "generated"], weights=[0.5, 0.5], length=32, batch_size=4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run = trainer(max_steps=1, limit_val_batches=0)
    run.strategy.connect(module)
    data.trainer = run
    data.setup("fit")
    assert torch.equal(torch.rand(1), expected)
    written = data.tokenizer.decode(bh.generated(teacher)[0]["input_ids"][0], skip_special_tokens=True)
    trained = [data.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in data.splits["train"]]
    assert any(row in written for row in trained)


def test_generated_text_needs_a_model():
    data = TextDataModule("generated", tokenizer="tiny")
    with pytest.raises(ValueError, match=r"data='generated' is text of the model in training. Attach the data module"):
        data.setup("fit")
