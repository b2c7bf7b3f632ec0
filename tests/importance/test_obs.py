"""OBS: what is lost without a unit when the others make up for it, against least squares by hand."""

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Run
from billhook.units.find import find_units
from kit.families import build, tokens
from kit.shaped import bert


def inputs_of(model, reader, batches):
    """What a linear reads, of all batches together, float64; padding left out."""
    rows = []
    for batch in batches:
        hook = model.get_submodule(reader).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))  # noqa: B023
        with torch.no_grad():
            model(**batch)
        hook.remove()
        if "attention_mask" in batch:
            rows[-1] = rows[-1][batch["attention_mask"].bool()]
    return torch.cat([one.flatten(0, -2) for one in rows]).double()


def lost(weight, x, gone, damping):
    """The least of |W x - W' x|^2 + damping |W - W'|^2 over W' without some columns, by solving for it."""
    h = x.T @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    stay = [i for i in range(len(h)) if i not in gone]
    w = weight.double()
    new = torch.zeros_like(w)
    new[:, stay] = w[:, stay] + w[:, gone] @ h[gone][:, stay] @ torch.linalg.inv(h[stay][:, stay])
    return float(torch.trace((w - new) @ h @ (w - new).T)) / len(x)


@pytest.mark.parametrize(("name", "per"), [("llama", "head"), ("llama", "kv_head"), ("bert", "head")])
@pytest.mark.parametrize("passes", [1, 3])
def test_it_is_what_least_squares_leaves(name, per, passes):
    model = build("llama") if name == "llama" else bert()
    units = find_units(model, ["head", "channel"])
    batches = [{"input_ids": tokens(3, 9)}, {"input_ids": tokens(2, 11)}]
    batches[0]["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    batches[0]["attention_mask"][1, 6:] = 0
    if name == "bert":
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    found = bh.score(model, units, bh.OBS(0.02, passes), batches, per=per)
    assert list(found) == list(units)
    for place, one in units.items():
        (reader,) = one.readers
        x, weight = inputs_of(model, reader, batches), model.get_submodule(reader).weight.detach()
        index = one.positions(per) if one.kind == "head" else one.positions()
        expected = [lost(weight, x, [i for i, u in enumerate(index) if u == unit], 0.02) for unit in range(max(index) + 1)]
        torch.testing.assert_close(found[place].double(), torch.tensor(expected).double().sqrt(), rtol=2e-3, atol=1e-6)


def test_a_pass_reads_all_batches_once_without_dropout():
    model, calls = build("llama").train(), []
    units, batches = find_units(model, ["head", "channel"]), [{"input_ids": tokens(2, 9)} for _ in range(4)]
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    twice = bh.score(model, units, bh.OBS(passes=2), batches, per="kv_head")
    assert len(calls) == 2 * len(batches)
    once = bh.score(model, units, bh.OBS(), batches, per="kv_head")
    assert len(calls) == 3 * len(batches)
    assert all(torch.equal(once[name], twice[name]) for name in units)


def test_blocks_that_are_called_again_after_others_have_all_calls_counted():
    model, batches = build("llama"), [{"input_ids": tokens(2, 9)} for _ in range(2)]
    units, twice = find_units(model, ["head", "channel"]), [Run(lambda own=one: (model(**own), model(**own))) for one in batches]
    once = bh.score(model, units, bh.OBS(), batches)
    again = bh.score(model, units, bh.OBS(), twice)
    for name, own in once.items():
        torch.testing.assert_close(again[name], own)


def test_a_unit_that_others_can_make_up_for_is_worth_nothing():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():  # channels 3 and 7 give the same, but for a factor
        mlp.gate_proj.weight[7] = mlp.gate_proj.weight[3]
        mlp.up_proj.weight[7] = 2 * mlp.up_proj.weight[3]
    units, batches = find_units(model, ["channel"]), [{"input_ids": tokens(16, 12)}]
    scores = bh.score(model, units, bh.OBS(1e-6), batches)["model.layers.0.mlp"]
    alone = bh.score(model, units, bh.OutputNorm(), batches)["model.layers.0.mlp"]
    others = [i for i in range(48) if i not in (3, 7)]
    assert scores[[3, 7]].max() < 0.1 * scores[others].min()
    assert alone[[3, 7]].min() > 0.1 * alone[others].min()


@pytest.mark.parametrize(
    ("options", "match"), [({"damping": 0}, "damping=0 must be a number above 0"), ({"passes": 0}, "passes=0 must be")]
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        bh.OBS(**options)


def test_experts_are_read_by_nobody():
    model = build("mixtral")
    units = find_units(model, ["expert"])
    with pytest.raises(ValueError, match="importance=OBS needs consumer layers, and the units of .*experts.* have none"):
        bh.score(model, units, bh.OBS(), [{"input_ids": tokens()}], normalize=True)
