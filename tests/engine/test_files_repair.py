"""RepairConfig of a streamed model: the same bytes as in memory."""

import pytest
import torch
import transformers
from small_configs import small_config

import billhook as bh
from kit import stopped

MATCHED = bh.RepairConfig(match=bh.criteria.BlockMatching(steps=3))
KINDS = {
    transformers.LlamaForCausalLM: {"kv_heads": 0.5, "channels": 0.25},
    transformers.GPT2LMHeadModel: {"heads": 0.5, "channels": 0.25},
    transformers.T5ForConditionalGeneration: {"channels": 0.25},
}


def given(model):
    rows = [torch.cat([batch["input_ids"].roll(7 * place) + place for place in range(4)]) for batch in stopped.batches()]
    batches = [{"input_ids": ids % 99} for ids in rows]  # as many tokens as a refit needs
    both = model.config.is_encoder_decoder
    return [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches] if both else batches


def same(folder, model):
    found, expected = bh.load(folder).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def repaired(model, how=None):
    batches = given(model)
    plan = bh.plan(model, bh.OBS(), batches, **KINDS[type(model)])
    bh.apply(model, plan, weights=bh.repair(model, plan, batches, how))
    return model


@pytest.mark.daily("compensating-LlamaForCausalLM", "matched-T5*")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "how", [bh.RepairConfig(), bh.RepairConfig(compensate=False), MATCHED], ids=["compensating", "independent", "matched"]
)
def test_repaired_with_the_same_bytes(tmp_path, kind, how):
    torch.manual_seed(0)
    kind(small_config(kind.config_class)).eval().save_pretrained(tmp_path / "dense")
    dense, streamed = repaired(bh.load(tmp_path / "dense"), how), repaired(bh.stream(tmp_path / "dense", tmp_path / "out"), how)
    bh.save(streamed, tmp_path / "out")
    bh.save(dense, tmp_path / "in memory")
    assert same(tmp_path / "out", bh.load(tmp_path / "in memory"))


@pytest.mark.daily("while matching")
@pytest.mark.parametrize(
    ("blocks", "how"), [(2, None), (6, None), (6, MATCHED)], ids=["while refitting", "while cutting", "while matching"]
)
def test_stopped_and_called_again(tmp_path, monkeypatch, blocks, how):
    written, go_on = stopped.stop_after(blocks, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        repaired(bh.stream("tiny", tmp_path / "out", dtype="float32"), how)
    go_on()
    model = repaired(bh.stream("tiny", tmp_path / "out", dtype="float32"), how)
    bh.save(model, tmp_path / "out")
    assert written == [f"model.layers.{number}" for number in (0, 1, 2, 3)] * (2 if how is None else 3)
    assert same(tmp_path / "out", repaired(bh.load("tiny", dtype="float32"), how))


def test_the_model_stays_as_it_is(tmp_path):
    model, dense = bh.stream("tiny", tmp_path / "out", dtype="float32"), bh.load("tiny", dtype="float32")
    plan, batches = bh.pruning.plan_units(model, {0: [3]}, "channel"), given(dense)
    new = bh.repair(model, plan, batches)
    expected = bh.repair(dense, plan, batches)
    assert set(new) == set(expected)
    assert len(new) == len(expected)
    assert all(torch.equal(new[name], one) for name, one in expected.items())
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, dense(**batches[0]).logits)


def test_too_few_tokens(tmp_path):
    model = bh.stream("tiny", tmp_path / "out", dtype="float32")
    plan = bh.pruning.plan_units(model, {0: [3]}, "channel")
    with pytest.raises(ValueError, match=r"batches: repair of \S+ needs at least \d+ non-padding tokens"):
        bh.repair(model, plan, [{"input_ids": torch.arange(8)[None]}] * 2)
