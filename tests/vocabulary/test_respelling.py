"""Batches in the tokens that are left: rows, labels, padding, and targets."""

import numpy as np
import pytest
import torch

from billhook.vocabulary.respelling import Respelling
from billhook.vocabulary.tokenizer import Vocabulary
from kit.small_tokenizers import LINES, byte_level


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


def test_targets_of_another_length(tokenizer, respelling):
    source, target = (encoded(tokenizer, text)[:count] for text, count in ((LINES[0], 8), (LINES[1], 5)))
    batch = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    new = respelling(batch | {"labels": torch.tensor([[*target, -100]])})
    assert new["labels"][0].tolist() == encoded(respelling.tokenizer, tokenizer.decode(target))[:6]
    classes = respelling(batch | {"labels": torch.tensor([1])})["labels"]
    assert classes.tolist() == [1]


def test_what_cannot_be_rewritten(respelling):
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match="batches have token_type_ids for each token"):
        respelling({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    with pytest.raises(ValueError, match="labels are other tokens than the inputs"):
        respelling({"input_ids": ids, "labels": torch.tensor([[4, 7, -100]])})
