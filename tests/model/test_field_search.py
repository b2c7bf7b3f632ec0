"""Fields of configs with which a class builds other sizes."""

import pytest

from billhook.model import field_search
from billhook.model.field_search import build, find_fields
from kit.families import llama


def search(model, wanted, options, also=None):
    return list(find_fields(model, options, also or {}, wanted, lambda built: built.tensors == wanted))


@pytest.mark.parametrize("fields", [
    {}, {"intermediate_size": 40}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, {"vocab_size": 50},
])  # fmt: skip
def test_fewest_fields_with_the_wanted_sizes(fields):
    model = llama()
    options = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}
    options |= {"max_position_embeddings": 7}  # which determines no size
    wanted = build(model, fields).tensors
    found = search(model, wanted, list(options.items()))
    assert build(model, found[0]).tensors == wanted
    assert len(found[0]) <= len(fields)


def test_fields_that_change_in_any_case():
    model, also = llama(), {"vocab_size": 50}
    wanted = build(model, also | {"intermediate_size": 40}).tensors
    assert search(model, wanted, [("intermediate_size", 40)], also) == [also | {"intermediate_size": 40}]
    assert search(model, wanted, [("intermediate_size", 40)]) == []


def test_a_config_that_the_class_refuses():
    assert build(llama(), {"hidden_act": "none"}) is None
    assert build(llama(), {"vocab_size": "many"}) is None


def test_results_are_known_for_equal_models(monkeypatch):
    built, build_on_meta = [], field_search.build_on_meta
    monkeypatch.setattr(field_search, "build_on_meta", lambda *args: built.append(args) or build_on_meta(*args))
    known = build(llama(intermediate_size=92), {"intermediate_size": 46})  # sizes that no other test has
    assert built
    built.clear()
    assert build(llama(intermediate_size=92), {"intermediate_size": 46}) == known
    assert not built
