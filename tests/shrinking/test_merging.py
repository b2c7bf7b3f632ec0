"""KV heads merge or go, whichever loses less, within a budget of their cache: chosen, planned, repaired, saved."""

import copy

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.batches import Batch, runs_of
from billhook.pruning.amount import Amount
from billhook.pruning.plan import UnitPlan
from billhook.shrinking import pooling as merging
from billhook.shrinking.divergence import Divergence, split_batches
from billhook.shrinking.measurement import measure
from billhook.shrinking.modules import PrunableModule
from billhook.shrinking.planning import apply_plans, plan
from billhook.shrinking.scope import SearchScope
from kit import shrinks
from kit.families import build, llama, tokens

FEW = {"generations": 0, "importance": bh.importance.WeightNorm()}
LAYERS = range(3)


def texts(rows=6, length=20):
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(rows, length)}, name) for name in ("one", "two") * 3]


@torch.no_grad()
def grouped(alike=LAYERS, idle=(), noise=1e-3, **changes):
    """A Llama with four KV heads; in some layers pairs of them are nearly equal, in some the last two are for nothing."""
    torch.manual_seed(1)
    model = llama(num_hidden_layers=len(LAYERS), **changes)
    model.lm_head.weight.mul_(4)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.o_proj.weight.mul_(8)
        attention.q_proj.weight.mul_(4)
        for linear in (attention.k_proj, attention.v_proj) if number in alike else ():
            heads = linear.weight.view(4, 4, -1)
            heads[1::2] = heads[::2] + noise * heads.std() * torch.randn_like(heads[::2])
        if number in idle:
            attention.o_proj.weight[:, 16:] = 0
    return model


def logits(model):
    torch.manual_seed(5)
    with torch.no_grad():
        return model(tokens()).logits


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_heads_that_are_nearly_equal_merge_and_hardly_anything_changes(layers, tmp_path):
    model = grouped()
    before, parameters = logits(model), model.num_parameters()
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=0.5, layers=layers, repair=None, **FEW)
    assert shrunk.left == shrunk.limit == bh.summary(model).kv_cache_bytes
    assert set(shrunk.kept.values()) == {(4, 2)}
    assert not shrunk.plan.units
    assert [(plan.before, plan.after, len(plan.layers)) for plan in shrunk.merged] == [(4, 2, 3)]
    assert model.model.layers[0].self_attn.q_proj.out_features == 32
    assert parameters - model.num_parameters() == 3 * 2 * 2 * 4 * 32
    assert apart(logits(model), before) < 0.01
    assert shrunk.what == "4 -> 2 KV heads in 3 attention modules (pooled)"
    assert "4 -> 2 KV heads in 3 attention modules (svd)" in str(shrunk)
    assert "192 kv_cache_bytes (budget: 192)" in str(shrunk)
    assert shrunk.to_json()["merged"][0]["after"] == 2
    bh.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_heads_go_whose_query_heads_are_for_nothing(layers):
    model = grouped(alike=(), idle=LAYERS)
    before = logits(model)
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=0.5, layers=layers, repair=None, **FEW)
    assert not shrunk.merged
    assert {tuple(own) for own in shrunk.plan.units.values()} == {(4, 5, 6, 7)}
    assert shrunk.what == "without 12 heads in 3 attention modules"
    assert apart(logits(model), before) < 1e-5


def mixed(**options):
    """A model in some layers of which heads merge to two, in one to one, while in another one heads go."""
    model = grouped(alike=(0, 2), idle=(1,))
    heads = model.model.layers[2].self_attn
    with torch.no_grad():
        for linear in (heads.k_proj, heads.v_proj):
            linear.weight.copy_(linear.weight[:4].repeat(4, 1))
    return model, shrinks.shrink(model, texts(), **FEW | {"kv_cache_bytes": 5 / 12, "layers": "free", "repair": None} | options)


@pytest.mark.daily("repair1")
@pytest.mark.parametrize("repair", [None, bh.RepairConfig()])
def test_each_layer_has_its_own_way_and_the_model_is_saved(repair, tmp_path):
    model, shrunk = mixed(repair=repair)
    assert [now for _, now in shrunk.kept.values()] == [2, 2, 1]
    assert [(plan.after, plan.layers) for plan in shrunk.merged] == [
        (2, ("model.layers.0.self_attn",)),
        (1, ("model.layers.2.self_attn",)),
    ]
    assert shrunk.plan.units == {"model.layers.1.self_attn": [4, 5, 6, 7]}
    assert shrunk.left == shrunk.limit == bh.summary(model).kv_cache_bytes
    assert sum(shrunk.measured.values()) < 1e-4
    assert shrunk.what.endswith("; without 4 heads in 1 attention module")
    bh.save(model, tmp_path / "out")
    assert torch.equal(logits(bh.load(tmp_path / "out")), logits(model))


@pytest.mark.daily("repair1")
@pytest.mark.parametrize("repair", [None, bh.RepairConfig()])
def test_all_layers_alike_are_what_convert_kv_heads_makes(repair):
    model, batches = grouped(noise=0.3), texts(length=13)  # few enough that the search takes all
    expected, (fitted, _) = copy.deepcopy(model), split_batches(batches)
    shrunk = shrinks.shrink(model, batches, kv_cache_bytes=0.25, repair=repair, **FEW)
    assert [plan.after for plan in shrunk.merged] == [1]
    bh.convert_kv_heads(expected, 1, "svd", fitted, repair=repair)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert model.config.num_key_value_heads == expected.config.num_key_value_heads == 1


@pytest.mark.nightly
def test_layers_alike_share_the_frequencies_that_convert_kv_heads_chooses(tmp_path):
    model, expected = bh.load("tiny", dtype="float32"), bh.load("tiny", dtype="float32")
    batches = bh.Calibration("tiny", tokens=9 * 64, length=64).read(model)
    bh.convert_kv_heads(expected, 2, "svd", split_batches(batches)[0])
    shrunk = shrinks.shrink(model, batches, kv_cache_bytes=0.25, repair=None, **FEW)
    assert [(plan.after, plan.rope["rope_type"]) for plan in shrunk.merged] == [(2, "longrope")]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert model.config.rope_parameters == expected.config.rope_parameters
    bh.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.nightly
def test_pooled_heads_stay_equal_where_blocks_are_matched():
    model = bh.load("tiny", dtype="float32")
    fitted, held_out = split_batches(bh.Calibration("tiny", tokens=12 * 64, length=64).read(model))
    work = measure(SearchScope.find(model, Amount(kv_cache_bytes=0.25), True), fitted, held_out, bh.importance.WeightNorm(), None)
    values = []
    for match in (None, bh.criteria.BlockMatching(steps=10)):
        kept = {layer.name: 2 for layer in work.scope.modules}
        values.append(plan(work, work.scope.limit, kept, fitted, bh.RepairConfig(match=match)).weights)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        refitted, matched = (of_all[name].view(2, 4, 32, -1) for of_all in values)
        assert not torch.equal(matched, refitted)
        assert torch.equal(matched, matched[:, :1].expand_as(matched))


def measured(model, layers="free", **options):
    """What candidates lose, with the batches."""
    fitted, held_out = split_batches(texts())
    candidates = SearchScope.find(model, Amount(kv_cache_bytes=0.5), layers == "uniform")
    return measure(candidates, fitted, held_out, bh.importance.WeightNorm(), None, **options), fitted, held_out


@pytest.mark.daily("2")
@pytest.mark.parametrize("kept", [2, 1])
def test_a_variant_computes_what_convert_kv_heads_makes_of_that_layer(kept):
    model, name = grouped(noise=0.3), "model.layers.1.self_attn"
    work, fitted, held_out = measured(model)
    converted = copy.deepcopy(model)
    far = Divergence(converted, runs_of(converted, held_out))
    bh.convert_kv_heads(converted, kept, "svd", fitted, layers=[name])
    with work.cache.assembled({f"{name} merged": kept}):
        torch.testing.assert_close(logits(model), logits(converted), rtol=1e-4, atol=1e-4)
    assert work.cache.measured[f"{name} merged", kept] == pytest.approx(far.mean(), rel=1e-3)
    assert (name, kept) in work.pooling.chosen
    assert work.losses[name][levels(work)[name].index(kept)] == work.cache.measured[f"{name} merged", kept]


def levels(work):
    return {layer.name: layer.levels for layer in work.scope.modules}


def test_a_config_that_loses_more_than_a_smaller_one_is_no_choice():
    work, *_ = measured(grouped())
    removal, *_ = measured(grouped(), pool_heads=False)
    for name, numbers in levels(removal).items():
        assert numbers == (4, 3, 2, 1)
        assert levels(work)[name] == (4, 2, 1)
        assert removal.losses[name][1] > work.losses[name][1]
    assert {layer.allowed for layer in work.scope.modules} == {(4, 2, 1)}


def test_of_alike_layers_it_is_decided_together():
    """Two layers whose heads are equal outweigh one in which heads are for nothing."""
    work, *_ = measured(grouped(alike=(0, 1), idle=(2,)), "uniform")
    ways = {kept for _, kept in work.pooling.chosen}
    assert all({kept for name, kept in work.pooling.chosen if name == layer.name} == ways for layer in work.scope.modules)
    together = []
    names = [layer.name for layer in work.scope.modules]
    for keys in (names, [f"{name} merged" for name in names]):
        work.cache.substitutes.clear()
        with work.cache.assembled(dict.fromkeys(keys, 2)):
            together.append(work.divergence.mean())
    assert (2 in ways) == (together[1] < together[0])


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_heads_merge_beside_a_block_that_goes(layers, tmp_path):
    model = grouped()
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
        block.self_attn.o_proj.weight.zero_()
    before = logits(model)
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=1 / 3, layers=layers, repair=bh.RepairConfig(), **FEW)
    assert shrunk.blocks.units == {"model.layers": [1]}
    assert [now for _, now in shrunk.kept.values()] == [2, 0, 2]
    assert shrunk.left == shrunk.limit == bh.summary(model).kv_cache_bytes
    assert len(model.model.layers) == 2
    assert apart(logits(model), before) < 0.01
    assert shrunk.what.endswith("attention modules (pooled); without 1 of 3 blocks")
    bh.save(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.nightly
def test_repair_makes_up_for_both_ways_together():
    lost = {}
    for repair in (None, bh.RepairConfig()):
        model = grouped(alike=(0,), idle=(1,), noise=0.5)
        shrunk = shrinks.shrink(model, texts(30), kv_cache_bytes=0.5, layers="free", repair=repair, **FEW)
        assert shrunk.merged
        assert shrunk.plan.units
        lost[repair] = sum(shrunk.measured.values())
    assert lost[bh.RepairConfig()] < 0.8 * lost[None]


def test_nothing_has_changed_where_carrying_it_out_fails(monkeypatch):
    def fails(*given):
        raise RuntimeError("it fails")

    monkeypatch.setattr(UnitPlan, "change", fails)
    model = grouped(alike=(0, 2), idle=(1,))
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(RuntimeError, match="it fails"):
        shrinks.shrink(model, texts(), kv_cache_bytes=0.5, layers="free", repair=None, **FEW)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert logits(model).isfinite().all()


def test_optimizers_follow_and_restart_for_what_is_in_another_basis():
    model = grouped()
    optimizer = torch.optim.Adam(model.parameters())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    work, fitted, _ = measured(model, "uniform")
    assert (work.scope.modules[0].name, 2) in work.pooling.chosen
    limit, layers = work.scope.limit, work.scope.modules
    planned = plan(work, limit, {layer.name: 2 for layer in layers}, fitted, None)
    assert planned.merged
    apply_plans(model, planned.plans, [optimizer], planned.weights)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(names.values())
    for parameter, name in names.items():
        state = optimizer.state.get(parameter, {})
        assert bool(state) != ("self_attn" in name), name
        assert all(one.shape == parameter.shape for key, one in state.items() if key != "step")


@pytest.mark.nightly
def test_a_search_with_a_library_finds_the_same_again(tmp_path, monkeypatch):
    options = {"kv_cache_bytes": 0.5, "layers": "free", "repair": None, **FEW}
    first = shrinks.shrink(grouped(), texts(), variant_cache=tmp_path, **options)
    monkeypatch.setattr(merging, "gather", None)  # nothing is run for it again
    second = shrinks.shrink(grouped(), texts(), variant_cache=tmp_path, **options)
    assert first.merged
    assert first.to_json() == second.to_json()


@pytest.mark.daily("watching-free")
@pytest.mark.parametrize(("refused", "layers"), [("plans", "uniform"), ("watching", "free")])
def test_where_heads_cannot_merge_they_go(layers, refused, monkeypatch):
    def refuse(*given):
        raise ValueError("that cannot be")

    where, what = {"plans": (merging, "plan_kv_heads"), "watching": (merging, "gather")}[refused]
    monkeypatch.setattr(where, what, refuse)
    shrunk = shrinks.shrink(grouped(), texts(), kv_cache_bytes=0.5, layers=layers, repair=None, **FEW)
    assert not shrunk.merged
    assert shrunk.left == shrunk.limit
    assert shrunk.what == f"without {shrunk.words}"


@pytest.mark.nightly
def test_where_merging_saves_no_cache_heads_go():
    """GPT-2's linears hand out few heads many times, so that its cache would not be smaller."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=0.5, repair=None, **FEW)
    assert not shrunk.merged
    assert shrunk.left == shrunk.limit == bh.summary(model).kv_cache_bytes


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3", "uniform"), ("phi", "uniform"), ("gemma2", "uniform"), ("gemma2", "free")]
)
def test_other_families(family, layers, tmp_path):
    """One of them attends to all tokens in one layer, and to a few in the other."""
    torch.manual_seed(0)
    model = build(family)
    shrunk = shrinks.shrink(model, texts(), kv_cache_bytes=0.5, layers=layers, **FEW)
    assert shrunk.left == shrunk.limit == bh.summary(model).kv_cache_bytes
    bh.save(model, tmp_path / "out")
    assert torch.equal(logits(bh.load(tmp_path / "out")), logits(model))


def test_many_heads_may_merge_to_few():
    layer = PrunableModule(("a",), "head", 32, tuple(range(32, 0, -1)), 1, pool_sizes=(16, 8, 4, 2, 1))
    assert layer.grid() == (32, 28, 24, 20, 16, 12, 8, 4, 2, 1)
