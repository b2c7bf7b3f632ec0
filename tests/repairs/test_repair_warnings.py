"""That a model is refitted to one kind of text alone, or its heads merged on its own, is told once, and is no warning."""

import pytest
import transformers

import billhook as bh
from billhook.calibration import calibration
from billhook.engine.batches import Batch
from kit import shrinks
from kit.families import BERT, llama, tokens


@pytest.fixture
def told(caplog):
    calibration.log_once.cache_clear()
    yield lambda: [(one.levelname, one.message) for one in caplog.records if one.name == "billhook"]
    calibration.log_once.cache_clear()


def repair(model, *sources):
    batches = [Batch({"input_ids": tokens(4, 16)}, source) for source in sources]
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.5)
    return bh.repair(model, plan, batches)


ADVICE = [("WARNING", calibration.SINGLE_SOURCE)]


@pytest.mark.parametrize(("sources", "expected"), [
    (["text", "text"], ADVICE),
    (["", ""], ADVICE),
    (["generated", "generated"], []),
    (["text", "generated"], []),
    (["text", "other"], []),
])  # fmt: skip
def test_by_the_sources(sources, expected, told):
    assert repair(llama(), *sources)
    assert told() == expected


def test_once_in_a_process(told):
    model = llama()
    repair(model, "text", "text")
    repair(model, "other", "other")
    assert told() == ADVICE


def test_not_of_a_model_that_writes_nothing(told):
    repair(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), "text", "text")
    assert told() == []


def test_in_a_search_and_in_kv_heads(told):
    batches = [Batch({"input_ids": tokens(2, 16)}, "text") for _ in range(4)]
    shrinks.shrink(llama(), batches, params=0.95, generations=0)
    assert told() == ADVICE
    calibration.log_once.cache_clear()
    bh.convert_kv_heads(llama(), 1, "svd", batches=batches, repair=bh.RepairConfig())
    assert told() == 2 * ADVICE


@pytest.mark.daily("sources0-*")
@pytest.mark.parametrize(
    ("sources", "expected"), [(["generated"], [("WARNING", calibration.ONLY_SELF_GENERATED)]), (["text", "generated"], [])]
)
def test_where_heads_are_merged_on_nothing_but_its_own_text(sources, expected, told):
    batches = [Batch({"input_ids": tokens(2, 16)}, source) for source in sources * (4 // len(sources))]
    bh.convert_kv_heads(llama(), 1, "svd", batches=batches)
    assert told() == expected
