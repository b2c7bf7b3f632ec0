"""A model is traced once, and what is remembered of it is nobody else's."""

import importlib
import json

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model.cache import clear_cache
from billhook.model.costs import costs_of
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


def test_a_plan_and_its_application_trace_a_model_once(runs):
    model = llama()
    plan = bh.plan(model, importance=bh.importance.WeightNorm(), kv_heads=0.5, channels=0.25)
    bh.apply(model, plan)
    assert runs.count(runs[0]) == 1


def test_models_alike_are_traced_once_whatever_they_come_as(runs):
    model = llama()
    structures = [bh.trace(one) for one in (model, model.eval(), llama(), nn.ModuleDict({"model": model}), model.config)]
    assert len({str(one) for one in structures}) == 1
    assert len(runs) == 2  # nobody has chosen the attention of a model that is built from a config


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


def test_given_inputs_and_modules_of_another_kind_are_run_each_time(runs):
    model, own = llama(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for _ in range(2):
        bh.trace(model, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
        bh.trace(own, torch.ones(2, 4))
    assert len(runs) == 4


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


def test_costs_are_found_once_and_again_after_a_change(monkeypatch):
    module = importlib.import_module("billhook.model.costs")
    run, seen = module._flops_on_meta, []
    monkeypatch.setattr(module, "_flops_on_meta", lambda *given: (seen.append(1), run(*given))[1])
    clear_cache()
    model = llama()
    before = costs_of(model)
    assert costs_of(model) == before
    assert len(seen) == 1
    bh.pruning.prune_units(model, {0: [0]}, per="kv_head")
    assert costs_of(model) != before
    assert len(seen) == 2
    clear_cache()
