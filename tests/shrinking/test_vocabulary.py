"""Vocabularies in a search: what fewer tokens cost is what the smaller model loses, and unused ones go first."""

import math

import pytest
import torch

import billhook as bh
from billhook.calibration.reading import load_splits
from billhook.engine.batches import Batch
from billhook.model.preprocessors import load_tokenizer
from billhook.pruning.planning import plan_units
from billhook.report.texts import ExampleText, bits_per_byte
from billhook.shrinking.vocabulary import VocabularyText, find_levels


@pytest.fixture(scope="module")
def text():
    tokenizer = load_tokenizer("tiny")
    lines = "\n".join(load_splits("tiny")["validation"][:200]["text"])
    ids = torch.tensor(tokenizer(lines, add_special_tokens=False)["input_ids"])[: 12 * 32].view(12, 32)
    return tokenizer, [Batch({"input_ids": row[None]}, "ab"[number % 2]) for number, row in enumerate(ids)]


def test_a_level_costs_what_the_smaller_model_loses(text):
    tokenizer, batches = text
    model = bh.load("tiny", "float32")
    found = find_levels(model, "params", VocabularyText(tokenizer, batches[:2]), batches[2:6])
    assert (found.size, found.levels[0].loss, found.levels[0].saved) == (2048, 0, 0)
    sizes = [len(level.kept) for level in found.levels]
    assert sizes == sorted(set(sizes), reverse=True)
    level = found.levels[-1]
    smaller = bh.load("tiny", "float32")
    plan = plan_units(smaller, sorted({*range(2048)} - {*level.kept.tolist()}), "token")
    assert plan.parameters[0] - plan.parameters[1] == level.saved
    bh.apply(smaller, plan)
    losses = []
    for source in "ab":
        examples = [ExampleText.of(row, tokenizer) for one in batches[2:6] if one.source == source for row in one["input_ids"]]
        (before, tokens), (after, _) = (
            bits_per_byte(own.eval(), encoder, examples)
            for own, encoder in ((model, tokenizer), (smaller, plan.trim_tokenizer(tokenizer)))
        )
        losses.append((after - before) * math.log(2) / tokens)  # nats per token of the dense model
    assert level.loss == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_unused_tokens_go_before_anything_else(text, tmp_path):
    tokenizer, batches = text
    model = bh.load("tiny", "float32")
    search = bh.Search(generations=0, repair=None, tokens=True)
    shrunk = bh.shrink(model, bh.Budget(params=0.9), batches, search=search, text=VocabularyText(tokenizer, batches))
    assert shrunk.tokens is not None
    assert model.num_parameters() == shrunk.left <= shrunk.limit == int(0.9 * 2754816)
    assert "removed tokens: " in shrunk.text()
    assert shrunk.to_json()["tokens"] == shrunk.tokens.after
    bh.save(model, tmp_path / "out", shrunk.tokens.trim_tokenizer(tokenizer))
    assert bh.load(tmp_path / "out").config.vocab_size == model.config.vocab_size < 2048


def test_without_text_or_for_another_budget(text):
    model = bh.load("tiny", "float32")
    with pytest.raises(ValueError, match="tokens=True requires text"):
        bh.shrink(model, bh.Budget(params=0.9), text[1], search=bh.Search(tokens=True))
    with pytest.raises(ValueError, match="tokens=False does not use text"):
        bh.shrink(model, bh.Budget(params=0.9), text[1], text=VocabularyText(*text))
    with pytest.raises(ValueError, match="tokens=True does not support max_loss=1.1"):
        bh.shrink(model, bh.Budget(max_loss=1.1), text[1], search=bh.Search(tokens=True), text=VocabularyText(*text))
    with pytest.raises(ValueError, match="tokens=True is not supported in training"):
        bh.Shrinking(bh.Budget(params=0.9), search=bh.Search(tokens=True))
