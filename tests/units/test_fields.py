"""Fields of configs that count units: found by building, and once."""

import billhook as bh
from billhook.units.fields import FieldFinder
from kit.families import llama


def groups_of(model, *kinds):
    return [group for group in bh.trace(model).groups if group.kind in kinds]


def test_of_kinds_of_units():
    model = llama()
    finder = FieldFinder(model)
    assert finder.find(groups_of(model, "channel")) == ("intermediate_size",)
    assert finder.values(48, ("intermediate_size",), 40) == {"intermediate_size": 40}
    assert finder.find(groups_of(model, "channel")[:1]) == ()  # of one layer alone no field says it
    assert finder.find(groups_of(model, "kv_head")) == ("num_attention_heads", "num_key_value_heads")  # with their query heads
    assert finder.find(groups_of(model, "query_head")) == ("num_attention_heads",)
    assert finder.find(groups_of(model, "residual")) == ("hidden_size",)
