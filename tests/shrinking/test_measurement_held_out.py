"""Batches that degradation is measured on: some of each source, and not more tokens than it takes."""

import pytest
import torch

from billhook.engine.batches import Batch, runs_of
from billhook.shrinking.divergence import PER_INPUT, limit_tokens, search_batches, split_batches
from kit.families import llama, tokens


def test_a_fifth_of_each_source_is_held_out():
    batches = [Batch({"input_ids": tokens(1, 8)}, name) for name in ["one"] * 10 + ["two"] * 2]
    fitted, held_out = split_batches(batches)
    numbers = {id(batch): number for number, batch in enumerate(batches)}
    assert [batch.source for batch in held_out] == ["one", "one", "two"]
    assert [numbers[id(batch)] for batch in held_out] == [2, 7, 11]
    assert sorted(numbers[id(batch)] for batch in [*fitted, *held_out]) == list(range(12))
    assert len(split_batches([{"input_ids": tokens()}] * 3)[0]) == 2
    with pytest.raises(ValueError, match="got 2"):
        split_batches([{"input_ids": tokens(1, 8)}] * 2)


def test_few_batches_are_taken_apart_into_rows():
    ids, positions = tokens(5, 8), torch.arange(8)[None]
    fitted, held_out = split_batches([Batch({"input_ids": ids, "position_ids": positions}, "one")])
    assert [tuple(one["input_ids"].shape) for one in [*fitted, *held_out]] == [(1, 8)] * 5
    assert torch.equal(held_out[0]["input_ids"], ids[2:3])
    assert held_out[0].source == "one"
    assert torch.equal(held_out[0]["position_ids"], positions)
    assert len(split_batches([(ids, ids)])[0]) == 4


def test_what_is_not_measured_is_fitted():
    fitted, held_out = split_batches([{"input_ids": tokens(4, 400)} for _ in range(20)])
    assert [len(batch["input_ids"]) for batch in held_out] == [4, 4, 2]
    assert len(fitted) == 17


def test_no_more_rows_than_a_share_of_the_tokens():
    batches = [Batch({"input_ids": tokens(4, 10), "attention_mask": torch.ones(4, 10)}, "one")]
    batches += [Batch({"input_ids": tokens(2, 30)}, "two") for _ in range(3)]
    *found, third, last = limit_tokens(batches, 60)
    assert third is last is None
    assert [(one.source, tuple(one["input_ids"].shape)) for one in found] == [("one", (3, 10)), ("two", (1, 30))]
    assert len(found[0]["attention_mask"]) == 3
    assert limit_tokens(batches, 1000) == batches
    assert [one and len(one["input_ids"]) for one in limit_tokens(batches, 2)] == [1, 1, None, None]
    runs = runs_of(llama(), batches[:1])
    assert limit_tokens(runs, 5) == runs


def test_variants_are_fitted_to_some_of_many_batches_of_each_source_and_to_all_of_few():
    batches = [Batch({"input_ids": torch.zeros(2, 10)}, "ab"[number % 2]) for number in range(40)]
    found = search_batches(batches, 10)
    assert [one.source for one in found] == ["a", "b"] * 3
    assert sum(len(one["input_ids"]) for one in found) == PER_INPUT
    assert search_batches(batches, 1000) == batches
    assert search_batches(batches[:1], 1) == batches[:1]
