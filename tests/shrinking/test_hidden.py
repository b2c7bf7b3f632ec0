"""The hidden size within the same budget: what it saves, what it loses, chosen where that is nothing, and saved."""

import copy

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.batches import Batch, runs_of
from billhook.model.config_fields import build_on_meta
from billhook.pruning.amount import Amount
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.shrinking.blocks import find_blocks
from billhook.shrinking.divergence import Divergence, divided
from billhook.shrinking.hidden import HIDDEN, find_hidden
from billhook.shrinking.levels import find_places
from billhook.shrinking.planned import as_planned
from billhook.shrinking.smallest import Found
from billhook.shrinking.work import Work
from kit.families import BERT, build, llama, tokens

FEW = {"generations": 1, "candidates": 2}
IDLE = [3, 4, 5, 9, 10, 20, 21, 30]
"""A quarter of the stream."""


def texts(rows=6, length=20):
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(rows, length)}, name) for name in ("one", "two") * 3]


def narrow(family="llama", **changes):
    """A model whose predictions suffer when it is cut, and a quarter of whose stream is zero everywhere."""
    torch.manual_seed(1)
    model = build(family, num_hidden_layers=3, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(4)
            layer.self_attn.o_proj.weight.mul_(4)
        model.model.embed_tokens.weight[:, IDLE] = 0
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                parameter[IDLE] = 0
    return model


def size_at(model, hidden):
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = hidden, 4
    return build_on_meta(model, config).num_parameters()


@pytest.mark.parametrize("layers", ["uniform", "free"])
@pytest.mark.parametrize("target", ["params", "bytes"])
def test_a_stream_that_is_partly_idle_becomes_narrower_and_nothing_is_lost(layers, target, tmp_path):
    model, ids = narrow(), tokens()
    with torch.no_grad():
        before = model(ids).logits
    limit = size_at(model, 24) * {"params": 1, "bytes": 4}[target]
    shrunk = bh.shrink(model, texts(), **{target: limit}, layers=layers, repair=None, **FEW)
    assert shrunk.left == shrunk.limit == getattr(bh.summary(model), target)
    assert shrunk.kept[HIDDEN] == (32, 24)
    assert {before == now for name, (before, now) in shrunk.kept.items() if name != HIDDEN} == {True}
    assert shrunk.blocks is None
    assert [sorted(own) for own in shrunk.plan.units.values()] == [IDLE]
    assert model.config.hidden_size == 24
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert sum(shrunk.measured.values()) < 1e-5
    bh.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert "32 -> 24 residual channels" in str(shrunk)


@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_all_that_goes_goes_together_and_is_repaired(layers, tmp_path):
    model, ids = narrow(), tokens()
    limit = int(0.8 * size_at(model, 24))
    shrunk = bh.shrink(model, texts(), params=limit, layers=layers, **FEW)
    assert shrunk.kept[HIDDEN] == (32, 24)
    assert any(now < count for name, (count, now) in shrunk.kept.items() if name != HIDDEN)
    assert shrunk.left == model.num_parameters() <= limit
    assert limit - shrunk.left < 3 * 24 * (3 if layers == "uniform" else 1)
    assert "residual" in shrunk.plan.kinds.values()
    bh.save(model, tmp_path / "out")
    again = bh.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
        assert torch.equal(again(ids).logits, model(ids).logits)


def searched(model, layers, params, repair):
    """A work with what it has found."""
    fitted, held_out = divided(texts())
    work = Work.begun(model, Amount(params=params), layers == "uniform")
    work.measure(fitted, held_out, bh.OBS(), repair)
    return work, Found.within(work, fitted, repair, lambda: work.chosen(1, 2, 0))


@pytest.mark.parametrize("repair", [Repair(), None], ids=["repaired", "cut"])
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_what_is_expected_is_what_is_computed_and_the_model_stays_until_then(layers, repair):
    model, ids = narrow(), tokens()
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    work, found = searched(model, layers, int(0.2 * size_at(model, 24)), repair)
    assert found.kept[HIDDEN] == 24
    assert found.planned.blocks is not None
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with as_planned(found.planned, work.hidden, found.kept), torch.no_grad():
        expected = model(ids).logits
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bh.apply(model, found.planned.units, weights=found.planned.weights)
    bh.apply(model, found.planned.blocks)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_repair_within_the_narrow_stream_is_that_of_a_narrow_model():
    model, (fitted, _) = narrow(), divided(texts())
    work, found = searched(model, "free", int(0.8 * size_at(model, 24)), Repair())
    assert found.planned.blocks is None
    smaller = copy.deepcopy(model)
    smaller.load_state_dict(smaller.state_dict() | work.hidden.scales(found.kept))
    bh.apply(smaller, bh.plan_units(smaller, {"": IDLE}, "residual"))
    units, kinds = found.planned.inside
    plan = bh.plan_units(smaller, units, kinds)
    bh.apply(smaller, plan, weights=bh.repair(smaller, plan, fitted, Repair()))
    bh.apply(model, found.planned.units, weights=found.planned.weights)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, smaller.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_what_is_lost_is_measured_of_a_model_that_is_really_narrower(family):
    torch.manual_seed(2)
    model = build(family, num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    work, _ = searched(model, "free", 0.8, None)
    held_out, kept = divided(texts())[1], {HIDDEN: work.hidden.widths[-1].kept}
    smaller = copy.deepcopy(model)
    smaller.load_state_dict(smaller.state_dict() | work.hidden.scales(kept))
    bh.apply(smaller, bh.plan_units(smaller, work.hidden.gone(kept), "residual"))
    far = Divergence(model, runs_of(model, held_out))
    with torch.no_grad():
        ids = held_out[0]["input_ids"]
        p, q = (one(ids).logits.log_softmax(-1) for one in (model, smaller))
    source = held_out[0].source
    with work.hidden.narrowed(kept):
        assert far.by_source()[source] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        assert far.mean() == pytest.approx(work.library.measured[HIDDEN, kept[HIDDEN]], rel=1e-4)
    assert far.mean() == pytest.approx(0, abs=1e-6)


def found_of(model, uniform=False, **amount):
    search = Search(model, Amount(**amount))
    target = search.amount.target
    places = find_places(search, target)
    blocks = find_blocks(search, target, places)
    return search, places, find_hidden(search, target, places, blocks, uniform)


@pytest.mark.parametrize("target", ["params", "bytes"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gemma2"])
def test_all_costs_what_its_removal_saves_at_a_smaller_hidden_size(family, target):
    model = build(family, num_hidden_layers=3)
    search, _, hidden = found_of(model, **{target: 0.5})
    width = hidden.widths[-1]
    bh.apply(model, bh.plan_units(model, {hidden.name: list(range(width.kept, 32))}, "residual"))
    assert getattr(bh.summary(model), target) == width.now
    for place in {place.kind: place for place in width.places}.values():
        smaller = copy.deepcopy(model)
        bh.prune_units(smaller, {place.names[0]: search.units[place.name].query_heads([0])}, kind=place.kind)
        assert width.now - place.each == getattr(bh.summary(smaller), target)
    block = width.blocks[-1]
    bh.prune_units(model, {"model.layers": [block.number]}, kind="block")
    assert width.now - block.cost == getattr(bh.summary(model), target)


def test_sizes_are_multiples_and_those_that_a_config_can_say_where_layers_stay_alike():
    assert [width.kept for width in found_of(llama(), params=0.5)[2].widths] == [24]  # a head for each of 8
    wide = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    assert [width.kept for width in found_of(wide, params=0.5)[2].widths] == [60, 56, 52, 48]
    assert [width.kept for width in found_of(wide, params=0.5, round_to=8)[2].widths] == [56, 48]
    qwen = build("qwen2")
    assert found_of(qwen, params=0.5)[2].widths
    _, _, hidden = found_of(qwen, uniform=True, params=0.5)
    assert not hidden.widths
    assert "the config of a Qwen2ForCausalLM cannot say that it is 24" in hidden.why


def test_where_it_stays_it_is_said():
    shrunk = bh.shrink(llama(), texts(), kv_cache_bytes=0.5, **FEW)
    assert "the hidden size stays: it is left as it is for a budget of kv_cache_bytes" in str(shrunk)
    assert HIDDEN not in shrunk.kept
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    shrunk = bh.shrink(bert, texts(), params=0.99, **FEW)
    assert shrunk.left == bert.num_parameters()


def test_an_importance_that_cannot_score_it_leaves_that_to_the_norms_of_weights():
    model = narrow()
    work = Work.begun(model, Amount(params=0.6), uniform=False)
    fitted, held_out = divided(texts())

    class Heads(bh.WeightNorm):
        def sums(self, model, units, per, runs):
            if any(one.kind == "residual" for one in units.values()):
                raise ValueError("no")
            return super().sums(model, units, per, runs)

    work.measure(fitted, held_out, Heads(), None)
    own = {work.hidden.name: work.hidden.units[work.hidden.name]}
    scores = bh.score(model, own, bh.WeightNorm())[work.hidden.name]
    assert work.hidden.gone({HIDDEN: 24})[work.hidden.name] == sorted(scores.argsort(stable=True)[:8].tolist())


def test_with_a_budget_of_quality_it_is_met_by_the_narrow_model():
    model, dense = narrow(), narrow()
    shrunk = bh.shrink(model, texts(), max_loss=1.05, generations=0)
    assert shrunk.kept[HIDDEN] == (32, 24)
    assert shrunk.ratio <= 1.05
    held_out = divided(texts())[1]
    with torch.no_grad():
        losses = [[float(one(b["input_ids"], labels=b["input_ids"]).loss) for b in held_out] for one in (dense, model)]
    rise = sum(after - before for before, after in zip(*losses, strict=True)) / len(held_out)
    assert shrunk.ratio == pytest.approx(torch.tensor(rise).exp().item(), rel=1e-3)
