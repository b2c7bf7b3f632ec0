"""Data modules for text: chats and prompts, blocks and padding, several sources, and a validation split held out."""

import json

import datasets
import lightning.pytorch as pl
import pytest
import torch

import billhook as bh
from billhook.calibration.conversations import encode
from billhook.calibration.examples import IGNORE_INDEX
from kit.chats import TAGGED, chat, talking
from kit.families import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # streams have no validation
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

CHATS = [chat(f"Question {n}?", f"Answer {n}, of {'some ' * n}words.") for n in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    talking().save_pretrained(folder / "talking")
    talking(TAGGED).save_pretrained(folder / "tagged")
    write(folder / "chats.jsonl", [{"messages": own, "id": n} for n, own in enumerate(CHATS)])
    pairs = [{"prompt": own[0]["content"], "response": own[1]["content"]} for own in CHATS]
    write(folder / "pairs.jsonl", pairs)
    datasets.Dataset.from_list(pairs).to_csv(folder / "pairs.csv")
    datasets.Dataset.from_list([{"messages": own} for own in CHATS]).to_parquet(folder / "chats.parquet")
    write(folder / "text.jsonl", [{"text": f"Document {n} is about {'very ' * n}little."} for n in range(40)])
    return folder


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def made(folder, data, split="train", tokenizer="talking", **options):
    options = {"length": 16, "batch_size": 2, "validation": 0} | options
    module = bh.TextDataModule(data, str(folder / tokenizer), **options)
    module.setup("fit")
    return list(module.splits[split])


def file(folder, name):
    return str(folder / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet", "pairs.jsonl", "pairs.csv"])
def test_the_same_chats_in_four_forms(folder, name, streaming):
    rows = list(encode({"messages": CHATS}, talking(), ["messages"], True, True))
    ids, learnt = ([value for row in rows for value in getattr(row, kind)] for kind in ("ids", "learned"))
    found = made(folder, file(folder, name), streaming=streaming)
    starts = [i for i in range(0, len(ids) - 15, 16) if any(learnt[i + 1 : i + 16])]
    assert [row["input_ids"] for row in found] == [ids[i : i + 16] for i in starts]
    assert [[label != IGNORE_INDEX for label in row["labels"]] for row in found] == [learnt[i : i + 16] for i in starts]
    assert all(
        label in (token, IGNORE_INDEX) for row in found for label, token in zip(row["labels"], row["input_ids"], strict=True)
    )


def test_loss_on_all_and_a_column_by_name(folder):
    path = file(folder, "chats.jsonl")
    found = made(folder, path, loss_on="all")
    assert [set(row) for row in found] == [{"input_ids"}] * len(found)
    assert made(folder, path, column="messages") == made(folder, path)
    assert set(made(folder, file(folder, "text.jsonl"))[0]) == {"input_ids"}


def test_padding(folder):
    module = bh.TextDataModule(file(folder, "chats.jsonl"), file(folder, "talking"), 64, 4, packing=False, validation=0)
    module.setup("fit")
    batch = module.collate()(list(module.splits["train"])[:4])
    rows = list(encode({"messages": CHATS[:4]}, talking(), ["messages"], True, True))
    assert batch["input_ids"].shape == (4, max(len(row.ids) for row in rows))
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert ids[mask.bool()].tolist() == row.ids
        assert (labels != IGNORE_INDEX).tolist() == row.learned + [False] * (len(ids) - len(row.ids))
        assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    assert not batch["attention_mask"].all()


def test_padding_of_plain_text_and_for_masked_models(folder):
    module = bh.TextDataModule(file(folder, "text.jsonl"), file(folder, "talking"), 64, 4, packing=False)
    module.setup("fit")
    batch = module.collate()(list(module.splits["train"])[:4])
    assert torch.equal(batch["labels"] != IGNORE_INDEX, batch["attention_mask"].bool())
    tokenizer = talking()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder / "masking")
    module = bh.TextDataModule(
        file(folder, "chats.jsonl"), file(folder, "masking"), 64, 4, mlm_probability=0.5, packing=False, validation=0
    )
    module.setup("fit")
    batch = module.collate()(list(module.splits["train"])[:4])
    labelled = batch["labels"] != IGNORE_INDEX
    assert labelled.any()
    assert not labelled[~batch["attention_mask"].bool()].any()


def test_rows_with_nothing_to_learn_are_told(folder, tmp_path, caplog):
    write(tmp_path / "a.jsonl", [{"messages": chat("Who " * 40, "He.")}, {"messages": chat("Who?", "He.")}])
    with caplog.at_level("INFO"):
        assert len(made(folder, file(tmp_path, "a.jsonl"), packing=False, length=32)) == 1
    assert "dropped 1 of 2 rows of the split 'train'" in caplog.text
    with pytest.raises(ValueError, match="length=4 leaves no token in the loss of any example of the split 'train'"):
        made(folder, file(tmp_path, "a.jsonl"), packing=False, length=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 1.0}, r"validation=1.0 must be in \[0, 1\)"),
        ({"loss_on": "prompts"}, "loss_on='prompts' must be"),
        ({"weights": [1.0]}, r"weights=\[1.0\] must have a number for each of the 2 sources"),
        ({"weights": [1.0, 0.0]}, "weights=0.0 must be a number above 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bh.TextDataModule(["a.jsonl", "b.jsonl"], "tiny", **options)


def test_lines_that_run_on_are_no_rows(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="packing=False requires rows"):
        made(folder, file(tmp_path, "a.txt"), packing=False)
    with pytest.raises(ValueError, match=r"data=\[\] must name at least one source"):
        bh.TextDataModule([], "tiny")


def test_several_sources_one_after_the_other(folder):
    chats, text = file(folder, "chats.jsonl"), file(folder, "text.jsonl")
    found, alone = made(folder, [chats, text]), (made(folder, chats), made(folder, text))
    assert [row["input_ids"] for row in found] == [row["input_ids"] for own in alone for row in own]
    assert [row["labels"] for row in found] == [row.get("labels") for own in alone for row in own]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_blocks(folder, streaming):
    chats, text = file(folder, "chats.jsonl"), file(folder, "text.jsonl")
    found = made(folder, [chats, text], weights=[3, 1], streaming=streaming)
    blocks = [{tuple(row["input_ids"]) for row in made(folder, own)} for own in (chats, text)]
    counts = [sum(tuple(row["input_ids"]) in own for row in found) for own in blocks]
    assert sum(counts) == len(found)
    assert {tuple(row["input_ids"]) for row in found} == blocks[0] | blocks[1], "each is seen whole"
    assert 2 < counts[0] / counts[1] < 4
    assert found == made(folder, [chats, text], weights=[3, 1], streaming=streaming)
    assert found != made(folder, [chats, text], weights=[3, 1], streaming=streaming, seed=1)
    validation = datasets.DatasetDict(validation=datasets.Dataset.from_dict({"text": ["one"]}))
    with pytest.raises(ValueError, match="weights: every source in data needs a split 'train'"):
        made(folder, [chats, validation], weights=[3, 1])


def texts(module, split):
    return [module.tokenizer.decode(row["input_ids"]) for row in module.splits[split]]


def apart(folder, data, **options):
    module = bh.TextDataModule(data, str(folder / "talking"), 64, 2, packing=False, **options)
    module.setup("fit")
    return module


def test_validation_is_held_out_where_there_is_none(folder, caplog):
    path = file(folder, "text.jsonl")
    with caplog.at_level("INFO"):
        module = apart(folder, path)
    assert "holding out 2 examples of 'train' for validation (0.05 of its rows, seed 0)" in caplog.text
    held, trained = texts(module, "validation"), texts(module, "train")
    assert len(held) == 2
    assert sorted(held + trained) == sorted(texts(apart(folder, path, validation=0), "train"))
    assert texts(apart(folder, path), "validation") == held
    assert texts(apart(folder, path, seed=1), "validation") != held
    assert len(texts(apart(folder, path, validation=0.25), "validation")) == 10
    assert "validation" not in apart(folder, path, validation=0).splits


def test_what_is_given_to_validate_on_is_taken(folder, caplog):
    text, chats = file(folder, "text.jsonl"), file(folder, "chats.jsonl")
    with caplog.at_level("INFO"):
        module = apart(folder, [{"train": text, "validation": text}, chats])
    assert [len(module.splits[split]) for split in ("train", "validation")] == [48, 40]
    assert "held out" not in caplog.text


def test_each_source_gives_to_validation(folder):
    module = apart(folder, [file(folder, "text.jsonl"), file(folder, "chats.jsonl")], validation=0.25)
    assert [len(module.splits[split]) for split in ("train", "validation")] == [36, 12]


def test_of_running_text_the_last_lines_are_held_out(folder, tmp_path):
    lines = [f"Line {n} of a text that runs on from line to line.\n" for n in range(40)]
    (tmp_path / "a.txt").write_text("".join(lines))
    module = bh.TextDataModule(file(tmp_path, "a.txt"), "tiny", 16, 2)
    module.setup("fit")
    held = "".join(texts(module, "validation"))
    assert held == "".join(lines[38:])[: len(held)]
    assert len(held) > 60


@pytest.mark.parametrize("streaming", [False, True])
def test_where_nothing_can_be_held_out_it_is_told(folder, tmp_path, caplog, streaming):
    write(tmp_path / "a.jsonl", [{"text": "word " * 100}, {"text": "a"}] if not streaming else [{"text": "word " * 100}] * 9)
    with caplog.at_level("INFO"):
        module = bh.TextDataModule(file(tmp_path, "a.jsonl"), "tiny", 16, 2, streaming=streaming)
        module.setup("fit")
    assert set(module.splits) == {"train"}
    assert (
        streaming or sum(row["input_ids"].count(module.splits["train"][0]["input_ids"][5]) for row in module.splits["train"]) > 90
    )
    assert "billhook: no validation, because" in caplog.text


class Record(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({name: value.clone() for name, value in batch.items()})


@pytest.mark.daily("True-True", "False-False")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_fit_resumes_bit_for_bit(folder, tmp_path, packing, streaming):
    def fit(steps, ckpt=None):
        record, module = Record(), bh.TransformerModule(llama(vocab_size=4096), lr=1e-2, decay="constant")
        data = bh.TextDataModule(
            [file(folder, "chats.jsonl"), file(folder, "text.jsonl")], file(folder, "tagged"), 24, 2,
            weights=[2, 1], packing=packing, streaming=streaming,
        )  # fmt: skip
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[record], num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=False)
        return record.seen, module.state_dict(), trainer

    torch.manual_seed(1)
    straight, weights, _ = fit(7)
    torch.manual_seed(1)
    _, _, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, again, trainer = fit(7, tmp_path / "a.ckpt")
    assert len(resumed) == 4
    assert all(torch.equal(one[name], other[name]) for one, other in zip(straight[3:], resumed, strict=True) for name in one)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert streaming or trainer.num_val_batches[0] > 0
