from dataclasses import replace

import pytest

from billhook.kv_heads.config import kv_heads_by_layer, next_layers
from billhook.kv_heads.plan import check_in_part, plan_kv_heads
from billhook.model.shape import shape_of
from kit.kv_zoo import build


def test_the_encoder_is_in_scope_on_request():
    model = build("bart")
    assert [name.split(".")[1] for name in kv_heads_by_layer(model, encoder=False)] == ["decoder"] * 4
    assert [name.split(".")[1] for name in kv_heads_by_layer(model)] == ["encoder"] * 2 + ["decoder"] * 4


@pytest.mark.parametrize(
    ("share", "names"), [(0.0, ""), (0.2, ""), (0.39, ""), (0.4, "e"), (0.5, "e"), (0.6, "de"), (0.8, "bde"), (1.0, "abde")]
)
def test_the_last_of_those_that_have_more_are_next(share, names):
    assert next_layers({"a": 8, "b": 8, "c": 1, "d": 8, "e": 8}, 1, share) == list(names)


def test_shares_are_not_rounded_down_twice():
    for count in range(1, 40):
        names = [str(number) for number in range(count)]
        assert [len(next_layers(dict.fromkeys(names, 8), 1, n / count)) for n in range(count + 1)] == list(range(count + 1))


def test_a_model_that_does_not_show_what_has_been_converted_is_refused():
    model = build("llama")
    part = plan_kv_heads(model, 2, layers=[1])
    check_in_part(model, part)
    with pytest.raises(ValueError, match="at: model.layers.1.self_attn cannot have fewer KV heads before others have"):
        check_in_part(model, replace(part, shape=shape_of(model)))
