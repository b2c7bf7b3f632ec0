"""A model is traced once, and what is remembered of it is nobody else's."""

import importlib
import json

import pytest

import billhook as bh
from billhook.model.cache import clear_cache
from billhook.tracing.axes import Axis, cut, leaves, mark, unify
from kit.families import build, llama


@pytest.fixture
def runs(monkeypatch):
    """The shapes of the models that are run to be traced."""
    module = importlib.import_module("billhook.tracing.trace")
    run, seen = module._run, []

    def counted(shadow, *rest, **options):
        seen.append(tuple((name, tuple(p.shape)) for name, p in shadow.named_parameters()))
        return run(shadow, *rest, **options)

    clear_cache()
    monkeypatch.setattr(module, "_run", counted)
    yield seen
    clear_cache()


def test_what_is_done_to_a_structure_does_not_reach_the_next(runs):
    model = llama()
    first = bh.trace(model)
    before = str(first), json.dumps(first.to_json())
    for structure in (first, bh.trace(model)):
        for group in structure.groups:
            mark(group.leaf, "opaque", "somebody")
            group.reason = "somebody"
            cut(group.leaf, 1)
            unify(group.leaf, Axis(group.leaf.size))
        structure.axes.clear()
        structure.opaque["somebody"] = 1
    again = bh.trace(model)
    assert (str(again), json.dumps(again.to_json())) == before
    assert len(runs) == 1


def test_a_remembered_structure_is_whole(runs):
    for family in ("llama", "mixtral", "gemma3_text"):
        model = build(family)
        first, again = bh.trace(model), bh.trace(model)
        assert first.to_json() == again.to_json()
        for group in again.groups:
            assert any(leaf is group.leaf for member in group.members for leaf in leaves(member.axis))
    assert len(runs) == 3


def test_a_model_that_has_changed_is_traced_again(runs):
    model = llama()
    bh.trace(model)
    plan = bh.plan(model, importance=bh.importance.WeightNorm(), channels=0.5)
    bh.apply(model, plan)
    narrow = bh.trace(model)
    assert {group.size for group in narrow.of_kind("channel")} == {model.config.intermediate_size}
    handle = model.model.register_forward_hook(lambda module, args, output: output)
    assert "hook" in str(bh.trace(model))
    handle.remove()
    assert str(bh.trace(model)) == str(narrow)
