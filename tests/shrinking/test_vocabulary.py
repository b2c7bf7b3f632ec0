"""Vocabularies in a search: what fewer tokens cost is what the smaller model loses, and unused ones go first."""

import pytest
import torch

import billhook as bh
from billhook.calibration.reading import load_splits
from billhook.engine.batches import Batch
from billhook.model.preprocessors import load_tokenizer
from billhook.pruning.planning import plan_units
from billhook.repairs import repair as repairs
from billhook.repairs.matching import BlockMatching
from billhook.report.texts import ExampleText, bits_per_byte
from billhook.shrinking.vocabulary import SmallerVocabularies, VocabularyText


@pytest.fixture(scope="module")
def text():
    tokenizer = load_tokenizer("tiny")
    lines = "\n".join(load_splits("tiny")["validation"][:200]["text"])
    ids = torch.tensor(tokenizer(lines, add_special_tokens=False)["input_ids"])[: 12 * 32].view(12, 32)
    return tokenizer, [Batch({"input_ids": row[None]}, "ab"[number % 2]) for number, row in enumerate(ids)]


def test_a_level_costs_what_the_smaller_model_loses(text):
    tokenizer, batches = text
    model = bh.load("tiny", "float32")
    vocabularies = SmallerVocabularies.find(model, "params", VocabularyText(tokenizer, batches[:2]))
    levels = vocabularies.measure(model, batches[2:6], excess=10**9)
    assert (vocabularies.size, levels[0].loss, levels[0].saved) == (2048, 0, 0)
    sizes = [len(level.kept) for level in levels]
    assert sizes == sorted(set(sizes), reverse=True)
    assert vocabularies.most_saved == levels[-1].saved
    enough = vocabularies.measure(model, batches[2:6], excess=levels[1].saved - 1)
    assert [level.saved for level in enough] == [0, levels[1].saved]  # no more than the budget requires
    counted = SmallerVocabularies.find(model, "params", VocabularyText(tokenizer, batches[:3]), batches[2:6])
    assert counted.others == vocabularies.others  # without what is held out
    level = levels[-1]
    smaller = bh.load("tiny", "float32")
    plan = plan_units(smaller, sorted({*range(2048)} - {*level.kept.tolist()}), "token")
    assert plan.parameters[0] - plan.parameters[1] == level.saved
    bh.apply(smaller, plan)
    losses = []
    for source in "ab":
        examples = [ExampleText.of(row, tokenizer) for one in batches[2:6] if one.source == source for row in one["input_ids"]]
        (before, _), (after, tokens) = (
            bits_per_byte(own.eval(), encoder, examples)
            for own, encoder in ((model, tokenizer), (smaller, plan.trim_tokenizer(tokenizer)))
        )
        losses.append(after - before)
        assert level.densities[source] == pytest.approx(tokens)
    assert level.loss == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_unused_tokens_go_before_anything_else(text, tmp_path):
    tokenizer, batches = text
    model = bh.load("tiny", "float32")
    search = bh.Search(generations=0, repair=None, tokens=True)
    shrunk = bh.shrink(model, bh.Budget(params=0.97), batches, search=search, text=VocabularyText(tokenizer, batches))
    assert shrunk.tokens is not None
    assert not shrunk.plan.units
    assert shrunk.blocks is None
    assert model.num_parameters() == shrunk.left <= shrunk.limit == int(0.97 * 2754816)
    assert shrunk.limit - shrunk.left < 32 * model.config.hidden_size  # to the next multiple of 32 tokens
    assert sum(shrunk.measured.values()) / 2 == pytest.approx(shrunk.token_loss, abs=1e-5)
    assert "removed tokens: bits per byte " in shrunk.text()
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


def test_a_budget_that_only_tokens_can_reach_and_units_beside_them_are_repaired(text, monkeypatch):
    match, matched = repairs.match_blocks, []
    monkeypatch.setattr(repairs, "match_blocks", lambda *args: matched.append(args) or match(*args))
    tokenizer, batches = text
    with pytest.raises(ValueError, match="out of reach"):
        bh.shrink(bh.load("tiny", "float32"), bh.Budget(params=0.2), batches, search=bh.Search(generations=0, repair=None))
    batches = [Batch({"input_ids": row[None]}, batch.source) for batch in batches for row in batch["input_ids"].view(2, 16)]
    losses = []
    for repair in (None, bh.RepairConfig(), bh.RepairConfig(match=BlockMatching(steps=20))):
        model = bh.load("tiny", "float32")
        search = bh.Search(generations=0, repair=repair, tokens=True)
        shrunk = bh.shrink(model, bh.Budget(params=0.2), batches, search=search, text=VocabularyText(tokenizer, batches))
        assert model.num_parameters() == shrunk.left <= shrunk.limit == int(0.2 * 2754816)
        assert shrunk.tokens is not None
        assert shrunk.plan.units
        assert shrunk.limit - shrunk.left < 32 * model.config.hidden_size  # tokens fill what units leave
        assert all(candidate.left <= shrunk.limit for candidate in shrunk.tried)
        losses.append(sum(shrunk.measured.values()) / 2)
    assert losses[2] < losses[1] < losses[0]
    assert len(matched) == 1  # the selected units alone
    with pytest.raises(ValueError, match=r"params=0\.01 \(27,548\) is out of reach"):
        bh.shrink(bh.load("tiny", "float32"), bh.Budget(params=0.01), batches, search=search, text=VocabularyText(*text))


def test_the_repair_sees_the_text_in_the_tokens_that_are_left(text):
    tokenizer, batches = text
    model = bh.load("tiny", "float32")
    vocabularies = SmallerVocabularies.find(model, "params", VocabularyText(tokenizer, batches[:1]))
    level = vocabularies.measure(model, batches[:2], excess=10**9)[-1]
    full = Batch({"input_ids": batches[3]["input_ids"], "labels": batches[3]["input_ids"].clone()}, "b")
    (batch,) = vocabularies.respell([full], level)
    ids = batch["input_ids"]
    assert batch.source == "b"
    assert set(ids.flatten().tolist()) <= set(level.kept.tolist())
    assert not torch.equal(ids, full["input_ids"])
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    spelled = tokenizer.decode(ids[real], clean_up_tokenization_spaces=False)
    assert tokenizer.decode(full["input_ids"][0], clean_up_tokenization_spaces=False).startswith(spelled)
    assert torch.equal(batch["labels"][real], ids[real])
