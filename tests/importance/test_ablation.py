"""A metric without each head, and with each head alone: against masks that are placed one by one."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.importance.ablation import HeadAblation
from kit.families import llama, tokens


def accuracy(model, batch):
    batch = dict(batch)
    labels = batch.pop("labels")
    return (model(**batch).logits.argmax(-1) == labels).double().mean()


def classifier():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model, [{"input_ids": tokens(8, 6), "labels": torch.randint(3, (8,))} for _ in range(2)]


@pytest.mark.parametrize("mode", ["without", "only"])
@pytest.mark.parametrize("metric", [None, accuracy])
def test_each_head_against_masks(mode, metric):
    model, batches = classifier()
    measure = metric or (lambda model, batch: model(**batch).loss)
    found = bh.importance.ablate_heads(model, batches, metric, mode)
    assert found.mode == mode
    names = [f"bert.encoder.layer.{layer}.attention" for layer in (0, 1)]
    assert list(found.values) == names
    with torch.no_grad():
        assert found.dense == pytest.approx(sum(float(measure(model, batch)) for batch in batches) / 2)
        for name in names:
            assert found.values[name].dtype == torch.float64
            for head in range(4):
                masked = [head] if mode == "without" else [other for other in range(4) if other != head]
                with bh.mask(model, {name: masked}):
                    expected = sum(float(measure(model, batch)) for batch in batches) / 2
                assert float(found.values[name][head]) == pytest.approx(expected, rel=1e-6)
    assert len({float(value) for values in found.values.values() for value in values}) > 2


@pytest.mark.parametrize("mode", ["without", "only"])
def test_kv_heads_and_a_causal_model(mode):
    model, ids = llama(), tokens()
    found = bh.importance.ablate_heads(model, [{"input_ids": ids}], mode=mode, per="kv_head")
    with torch.no_grad():
        for layer, values in enumerate(found.values.values()):
            assert values.shape == (4,)
            for head in range(4):
                queries = [2 * head, 2 * head + 1]
                masked = queries if mode == "without" else [other for other in range(8) if other not in queries]
                with bh.mask(model, {layer: masked}):
                    assert float(values[head]) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_predicts_nor_is_predicted(side, attention):
    model, ids = llama(attn_implementation=attention), tokens(2, 6)
    found = [bh.importance.ablate_heads(model, [{"input_ids": ids}])]
    for _ in range(2):
        padding = [tokens(2, 3), ids] if side == "left" else [ids, tokens(2, 3)]
        mask = [torch.zeros(2, 3), torch.ones(2, 6)] if side == "left" else [torch.ones(2, 6), torch.zeros(2, 3)]
        found.append(
            bh.importance.ablate_heads(model, [{"input_ids": torch.cat(padding, 1), "attention_mask": torch.cat(mask, 1).long()}])
        )
    for other in found[1:]:
        assert other.dense == pytest.approx(found[0].dense, rel=1e-5)  # rotary positions are relative, so a shift is nothing
        for name, values in found[0].values.items():
            torch.testing.assert_close(other.values[name], values, rtol=1e-5, atol=1e-5)


def test_it_is_a_table():
    values = {"first": torch.tensor([0.5, 0.75]).double(), "the second": torch.tensor([1.0, 0.25]).double()}
    lines = str(HeadAblation("without", 0.5, values)).splitlines()
    assert lines == [
        "change of the metric without each head, from 0.5000",
        "  first       +0.0000  +0.2500",
        "  the second  +0.5000  -0.2500",
    ]
    assert str(HeadAblation("only", 0.5, values)).startswith(
        "change of the metric with each head as the only head of its layer, from 0.5000\n"
    )


def test_what_is_not_legal_is_refused():
    model, batches = classifier()
    with pytest.raises(ValueError, match="mode='x' must be one of without, only"):
        bh.importance.ablate_heads(model, batches, mode="x")
    with pytest.raises(ValueError, match="per='x' must be one of head, kv_head"):
        bh.importance.ablate_heads(model, batches, per="x")
    with pytest.raises(ValueError, match="batches is empty. Pass at least one batch"):
        bh.importance.ablate_heads(model, [])
    with pytest.raises(ValueError, match="BertForSequenceClassification returns no loss for inputs input_ids"):
        bh.importance.ablate_heads(model, [{"input_ids": tokens()}])
