"""Batches in the tokens that are left: rows, labels, and padding."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from billhook.vocabulary.respelling import Respelling
from billhook.vocabulary.tokenizer import Vocabulary
from kit.small_tokenizers import KINDS, LINES, SPECIAL, byte_level, wrapped


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def respelling(tokenizer):
    """Without all that the first line does not need."""
    vocabulary, counts = Vocabulary(tokenizer), np.zeros(400)
    np.add.at(counts, tokenizer(LINES[0])["input_ids"], 1)
    required, others = vocabulary.order(counts, np.flatnonzero(counts))
    used = [token for token in others if counts[token]]
    last = others.index(used[-1])
    return Respelling(tokenizer, sorted(required + others[: last + 1]))


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_row_of_what_is_left_and_one_that_is_cut(tokenizer, respelling):
    same, other = (encoded(tokenizer, text)[:16] for text in LINES[:2])
    batch = {"input_ids": torch.tensor([same, other]), "labels": torch.tensor([same, other]), "number": torch.tensor([3, 4])}
    new = respelling(batch)
    assert new["input_ids"].shape == (2, 16)
    assert torch.equal(new["labels"], new["input_ids"])
    assert new["number"] is batch["number"]
    assert "attention_mask" not in new
    fewer = respelling.tokenizer
    assert new["input_ids"][0].tolist() == encoded(fewer, tokenizer.decode(same))
    assert new["input_ids"][1].tolist() == encoded(fewer, tokenizer.decode(other))[:16]
    assert len(encoded(fewer, tokenizer.decode(other))) > 16


def test_labels_stay_with_their_text_and_padding_out_of_the_loss(tokenizer, respelling):
    prompt, answer = (encoded(tokenizer, text)[:6] for text in (LINES[1], LINES[0]))
    rows = torch.tensor([prompt + answer + [3] * 12, [*answer, 2, *[3] * 17]])
    mask = torch.tensor([[1] * 12 + [0] * 12, [1] * 7 + [0] * 17])
    labels = torch.where(mask.bool(), rows, -100)
    labels[0, :6] = -100
    new = respelling({"input_ids": rows, "attention_mask": mask, "labels": labels})
    fewer = respelling.tokenizer
    spelled, told = encoded(fewer, tokenizer.decode(prompt)), encoded(fewer, tokenizer.decode(answer))
    assert len(spelled) > 6
    width = len(spelled + told)
    assert new["input_ids"][0].tolist() == spelled + told
    assert new["labels"][0].tolist() == [-100] * len(spelled) + told
    assert new["attention_mask"].sum(1).tolist() == [width, 7]
    assert new["labels"][1].tolist() == [*told, fewer.eos_token_id, *[-100] * (width - 7)]
    assert new["input_ids"][1, 7:].tolist() == [fewer.pad_token_id] * (width - 7)


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_begin_anywhere_keep_their_text(name):
    tokenizer = KINDS[name]()
    vocabulary, row = Vocabulary(tokenizer), encoded(tokenizer, "\n".join(LINES))
    required, others = vocabulary.order(np.zeros(vocabulary.size), np.array(row))
    respelling = Respelling(tokenizer, sorted(required + others[: len(others) // 5]))
    room = [3] * 600  # so that nothing is cut
    rows = [row[start : start + 5] for start in range(len(row) - 4)]
    batch = {
        "input_ids": torch.tensor([[*part, *room] for part in rows]),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 600 for _ in rows]),
    }
    new = respelling(batch)
    spelled = [ids[mask.bool()].tolist() for ids, mask in zip(new["input_ids"], new["attention_mask"], strict=True)]
    for start in range(len(rows) - 5):  # two rows, one after the other
        before, after = rows[start] + rows[start + 5], spelled[start] + spelled[start + 5]
        assert respelling.tokenizer.decode(after) == tokenizer.decode(before)


def test_a_token_inside_a_word_of_a_tokenizer_that_marks_ends():
    model = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>")
    training = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(LINES, training)
    tokenizer = wrapped(model)
    vocabulary = Vocabulary(tokenizer)
    required, ids = vocabulary.order(np.zeros(vocabulary.size), np.array([], dtype=int))
    respelling = Respelling(tokenizer, required)
    new = respelling(
        {"input_ids": torch.tensor([ids + [3] * 2000]), "attention_mask": torch.tensor([[1] * len(ids) + [0] * 2000])}
    )
    assert respelling.tokenizer.decode(new["input_ids"][0][new["attention_mask"][0].bool()]) == tokenizer.decode(ids)


def test_what_cannot_be_rewritten(respelling):
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match="batches have token_type_ids for each token"):
        respelling({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    for labels in ([[4, 7, -100]], [[4, 5]], [1]):
        with pytest.raises(ValueError, match="labels are other tokens than the inputs"):
            respelling({"input_ids": ids, "labels": torch.tensor(labels)})
