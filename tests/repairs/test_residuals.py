"""Which linears add to one stream, of families whose code is known."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.repairs.visitor import LinearCalls, combine_calls, record_calls, residual_order
from kit.families import build, tokens
from kit.losses import BUILD


def shown_by(model, **batch):
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return record_calls(linears, lambda: model(**batch))


def chain(*names):
    return dict(zip(names, [None, *names[:-1]], strict=True))


def test_the_residual_stream_of_a_llama_is_one_chain():
    model = BUILD["llama"]()
    expected = chain(*(f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")))
    shown = shown_by(model, input_ids=tokens())
    assert shown.predecessors == expected
    assert set(shown.calls.values()) == {1}
    assert not any(module._forward_hooks for module in model.modules())


def test_gpt2_and_t5():
    expected = chain(*(f"transformer.h.{i}.{name}.c_proj" for i in range(2) for name in ("attn", "mlp")))
    found = shown_by(BUILD["gpt2"](), input_ids=tokens()).predecessors
    assert {name: last for name, last in found.items() if "c_fc" not in name} == expected  # its GELU adds, too, to something new
    assert {last for name, last in found.items() if "c_fc" in name} == {None}
    parts = ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")
    encoder = chain(*(f"encoder.block.{i}.{name}" for i in range(2) for name in parts))
    parts = ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo")
    decoder = chain(*(f"decoder.block.{i}.{name}" for i in range(2) for name in parts))
    model = BUILD["t5"]().eval()
    assert shown_by(model, input_ids=tokens(), labels=tokens()).predecessors == encoder | decoder


def test_a_sum_that_is_normed_starts_anew():
    shown = shown_by(BUILD["bert"]().eval(), input_ids=tokens())
    assert shown.predecessors == {
        f"bert.encoder.layer.{i}.{name}": None for i in range(2) for name in ("attention.output.dense", "output.dense")
    }
    assert shown_by(build("gemma2"), input_ids=tokens()).predecessors == {}
    assert max(shown_by(BUILD["albert"]().eval(), input_ids=tokens()).calls.values()) == 3


def test_followed_are_those_between():
    shown = LinearCalls(dict.fromkeys("abcdex", 1), chain(*"abcde") | {"x": "x"})
    assert residual_order(shown, {"b", "d"}) == {"b": None, "c": "b", "d": "c"}
    assert residual_order(shown, {"e", "x"}) == {}
    assert residual_order(shown, {"y"}) == {}
    assert residual_order(shown, {"a", "e", "c"}) == chain(*"abcde")
    assert residual_order(LinearCalls(dict.fromkeys("abcde", 2), chain(*"abcde")), {"b", "d"}) == {}


def test_ranks_agree():
    one, other = (
        LinearCalls({"a": 1, "b": 2, "c": 1}, {"a": None, "c": "a"}),
        LinearCalls({"a": 1, "b": 1, "c": 1}, {"a": None, "c": "b"}),
    )
    assert combine_calls([one]) == combine_calls([one, one]) == one
    assert combine_calls([one, other]) == combine_calls([other, one]) == LinearCalls({"a": 1, "b": 2, "c": 1}, {"a": None})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_run_computes_what_it_always_does(family):
    model, ids = build(family), tokens()
    expected, found = model(ids).logits, []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    record_calls(linears, lambda: found.append(model(ids).logits))
    assert torch.equal(found[0], expected)
    assert isinstance(model, transformers.PreTrainedModel)
