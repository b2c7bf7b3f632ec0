"""Whole blocks within the same budget as layers: found, chosen, repaired, removed with them, saved."""

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.batches import Batch, runs_of
from billhook.pruning.amount import Amount
from billhook.pruning.target import RatioSearch
from billhook.repairs.matching import BlockMatching
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.blocks import Block, find_blocks
from billhook.shrinking.divergence import Divergence, split_batches
from billhook.shrinking.knapsack import Frontier, Slot, cost, loss
from billhook.shrinking.measurement import Measurement, measure
from billhook.shrinking.modules import PrunableModule, find_modules, uniform_groups
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.selection import search_within
from billhook.shrinking.shrink_plan import plan_choice, simulated
from billhook.shrinking.space import best_point, free_space, uniform_spaces, with_removal
from kit import shrinks
from kit.families import BERT, T5, build, llama, tokens

FEW = {"generations": 1, "candidates": 2}
QUICK = {"generations": 0, "importance": bh.importance.WeightNorm(), "repair": None}
LAYERS = "model.layers"


def texts(rows=6, length=20):
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(rows, length)}, name) for name in ("one", "two") * 3]


def uneven(idle=(), **changes):
    """A Llama whose predictions suffer when it is cut, and of which some blocks compute nothing."""
    torch.manual_seed(1)
    model = llama(num_hidden_layers=4, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(0.0 if number in idle else 4.0)
            layer.self_attn.o_proj.weight.mul_(0.0 if number in idle else 4.0)
    return model


def size_of_block(model):
    return sum(one.numel() for one in model.model.layers[0].parameters())


def losing_a_block(**options):
    """A model without two of its blocks and more, with what was found."""
    model = uneven(idle=[2])
    return model, shrinks.shrink(
        model, texts(), **FEW | {"params": model.num_parameters() - int(1.6 * size_of_block(model))} | options
    )


@pytest.mark.daily("params-free", "bytes-uniform")
@pytest.mark.parametrize("layers", ["uniform", "free"])
@pytest.mark.parametrize("target", ["params", "bytes"])
def test_a_block_that_computes_nothing_goes_first_and_nothing_is_lost(target, layers):
    model, ids = uneven(idle=[2]), tokens()
    with torch.no_grad():
        before, now = model(ids).logits, getattr(bh.summary(model), target)
    one = {"params": size_of_block(model), "bytes": 4 * size_of_block(model)}[target]
    shrunk = shrinks.shrink(model, texts(), **{target: now - one}, layers=layers, **QUICK)
    assert shrunk.blocks.units == {LAYERS: [2]}
    assert not shrunk.plan.units
    assert [now for _, now in shrunk.kept.values()] == [0 if ".2." in name else count for name, (count, _) in shrunk.kept.items()]
    assert shrunk.left == shrunk.limit == getattr(bh.summary(model), target)
    assert len(model.model.layers) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert "3 blocks; without 2" in str(shrunk)
    assert shrunk.words == "1 of 4 blocks"
    assert shrunk.to_json()["blocks"]["units"] == {LAYERS: [2]}


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_what_is_left_is_what_was_said_and_is_saved(layers, tmp_path):
    model, shrunk = losing_a_block(layers=layers)
    assert 2 in shrunk.blocks.units[LAYERS]
    stay = [number for number in range(4) if number not in shrunk.blocks.units[LAYERS]]
    assert len(model.model.layers) == len(stay) < 4
    for number, layer in zip(stay, model.model.layers, strict=True):
        assert shrunk.kept[f"{LAYERS}.{number}.mlp"][1] == layer.mlp.down_proj.in_features
        assert shrunk.kept[f"{LAYERS}.{number}.self_attn"][1] == layer.self_attn.k_proj.out_features // 4
    assert {now for name, (_, now) in shrunk.kept.items() if int(name.split(".")[2]) not in stay} == {0}
    assert shrunk.left == model.num_parameters() <= shrunk.limit
    assert shrunk.limit - shrunk.left < 3 * 32 * (4 if layers == "uniform" else 1)
    bh.save(model, tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained if layers == "uniform" else bh.load
    again, ids = load(tmp_path / "out").eval(), tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.isfinite(model(ids).logits).all()


def searched(model, layers, params, repair=None):
    """What candidates lose, with what was chosen."""
    fitted, held_out = split_batches(texts())
    candidates = SearchScope.find(model, Amount(params=params), layers == "uniform")
    measured = measure(candidates, fitted, held_out, bh.importance.WeightNorm(), repair)
    return measured, search_within(measured, fitted, repair, bh.Search(generations=1, candidates=2), 0, candidates.limit)


MATCHED = RepairConfig(match=BlockMatching(steps=20))


@pytest.mark.daily("refitted-free", "matched-free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
@pytest.mark.parametrize("repair", [RepairConfig(), MATCHED], ids=["refitted", "matched"])
def test_removed_computes_what_masked_does_with_the_repaired_weights(repair, layers):
    model = uneven(idle=[1])
    work, found = searched(model, layers, model.num_parameters() - int(1.6 * size_of_block(model)), repair)
    planned, ids = found.planned, tokens()
    masked = copy.deepcopy(model)
    masked.load_state_dict(masked.state_dict() | dict(planned.weights))
    with bh.mask(masked, planned.units), bh.mask(masked, planned.blocks), torch.no_grad():
        expected = masked(ids).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with simulated(model, planned), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one in planned.plans:
        bh.apply(model, one, weights=planned.weights if one is planned.units else None)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert [name for name in planned.weights if f"{LAYERS}.1." in name] == []


@pytest.mark.parametrize("repair", [RepairConfig(), MATCHED], ids=["refitted", "matched"])
def test_the_blocks_behind_make_up_for_one_that_goes(repair):
    model = uneven()
    fitted, held_out = split_batches(texts())
    candidates = SearchScope.find(model, Amount(params=model.num_parameters() - size_of_block(model)), uniform=False)
    kept = {layer.name: 0 if ".1." in layer.name else layer.count for layer in candidates.modules} | {f"{LAYERS}.1 block": 0}
    measured = Measurement(candidates, {}, {}, None, None, {}, Progress())
    planned, lost = plan_choice(measured, candidates.limit, kept, fitted, repair), []
    assert not planned.units.units
    assert {int(name.split(".")[2]) for name in planned.weights} == {2, 3}
    for weights in ({}, dict(planned.weights)):
        own = copy.deepcopy(model)
        far = Divergence(own, runs_of(own, held_out))
        own.load_state_dict(own.state_dict() | weights)
        bh.apply(own, planned.blocks)
        lost.append(far.mean())
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.nightly
def test_blocks_that_are_protected_stay():
    model = uneven(idle=[0, 3])
    shrunk = shrinks.shrink(model, texts(), params=0.6, layers="free", first=1, last=1, repair=None, **FEW)
    assert not set(shrunk.blocks.units[LAYERS] if shrunk.blocks else []) & {0, 3}
    candidates = SearchScope.find(uneven(), Amount(params=0.5), uniform=True)
    assert [block.number for block in candidates.blocks.removable] == [1, 2, 3]


def blocks_of(model, **amount):
    search = RatioSearch(model, Amount(**amount))
    return find_blocks(search, search.amount.target, find_modules(search, search.amount.target))


@pytest.mark.daily("llama-params", "gemma2-bytes")
@pytest.mark.parametrize("target", ["params", "bytes"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "gemma2"])
def test_a_block_costs_what_its_removal_saves(family, target):
    model = build(family, num_hidden_layers=3)
    blocks = blocks_of(model, **{target: 0.5})
    now, two = getattr(bh.summary(model), target), blocks.removable[1]
    bh.pruning.prune_units(model, {LAYERS: [two.number]}, kind="block")
    assert now - two.cost == getattr(bh.summary(model), target)


@pytest.mark.nightly
def test_models_whose_blocks_cannot_go_say_so():
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**BERT | {"num_hidden_layers": 3})).eval()
    with torch.no_grad():  # a norm stands behind the sum, so that a block of zeros is not the identity
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shrunk = shrinks.shrink(bert, texts(), params=0.95, **QUICK)
    assert shrunk.blocks is None
    assert "no block can be removed: " in str(shrunk)
    assert "changes the output even if the layers after its heads and channels are zero" in shrunk.blocks_stay
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | {"num_layers": 2})).eval()
    rows = [{"input_ids": tokens(8, 16), "labels": tokens(8, 10)} for _ in range(4)]
    assert (
        shrinks.shrink(t5, rows, params=0.97, **QUICK).blocks_stay == "encoder.block and decoder.block are separate block stacks"
    )
    assert "would be left without blocks" in shrinks.shrink(llama(num_hidden_layers=1), texts(), params=0.95, **QUICK).blocks_stay
    mixture = build("mixtral", num_hidden_layers=2)
    assert "changes the output even if" in shrinks.shrink(mixture, texts(), params=0.97, **QUICK).blocks_stay


def drawn(seed, count=3):
    """Layers of some blocks, heads and channels, one layer outside, what they lose, and what the blocks cost and lose."""
    random = np.random.default_rng(seed)
    layers, blocks, losses = [], [], {}
    for number in range(count):
        own = [
            PrunableModule((f"{number}.heads",), "head", 3, (3, 2, 1), int(random.integers(5, 9)), (3, 2, 1)),
            PrunableModule((f"{number}.channels",), "channel", 8, tuple(range(8, 0, -1)), int(random.integers(1, 5)), (8, 7, 6)),
        ]
        whole = sum(layer.cost(layer.count) for layer in own)
        blocks.append(Block(f"{number}", number, tuple(layer.name for layer in own), whole + int(random.integers(0, 9))))
        losses[blocks[-1].name] = [0.0, float(random.random() * 3)]
        layers += own
    layers.append(PrunableModule(("outside",), "channel", 5, (5, 4, 3, 2, 1), 3, (5, 4, 3)))
    for layer in layers:
        losses[layer.name] = [0.0, *np.cumsum(random.random(2)).tolist()]
    return layers, losses, blocks


@pytest.mark.parametrize("seed", range(5))
def test_free_blocks_lose_least_of_all_there_is(seed):
    layers, losses, blocks = drawn(seed)
    (space,) = free_space(layers, losses, blocks, now=500)
    rest = 500 - sum(block.cost for block in blocks) - 15
    every = []
    for gone in product((False, True), repeat=3):
        for chosen in product(range(3), repeat=7):
            price, lost = rest, 0.0
            for level, layer in zip(chosen, layers, strict=True):
                block = next((b for b in blocks if layer.name in b.modules), None)
                if block is None or not gone[block.number]:
                    price, lost = price + layer.cost(layer.levels[level]), lost + losses[layer.name][level]
            for block, away in zip(blocks, gone, strict=True):
                own = sum(layer.cost(layer.count) for layer in layers if layer.name in block.modules)
                price, lost = price + (0 if away else block.cost - own), lost + (losses[block.name][1] if away else 0)
            every.append((price, lost))
    for limit in np.linspace(rest + 3, 500, 25).astype(int).tolist():
        found, within = space.best(limit), [lost for price, lost in every if price <= limit]
        assert (found is None) == (not within)
        if found is not None:
            assert space.left(found) <= limit
            assert space.predicted(found) == pytest.approx(min(within))
            kept = space.kept(found)
            away = {block.name for block in blocks if kept.get(block.name) == 0}
            assert all((kept[name] == 0) == (block.name in away) for block in blocks for name in block.modules)
    assert space.left((0,) * len(space.slots)) == 500


@pytest.mark.parametrize("seed", range(5))
def test_alike_blocks_lose_least_of_all_there_is(seed):
    layers, losses, blocks = drawn(seed)
    alike = [replace(layer, unit_cost={"head": 7, "channel": 2}[layer.kind]) for layer in layers]
    spaces = uniform_spaces(alike, losses, blocks, now=500)
    ranked = sorted(blocks, key=lambda block: losses[block.name][1])
    every = []
    for count in range(4):
        away = {name for block in ranked[:count] for name in block.modules}
        stay = [layer for layer in alike if layer.name not in away]
        kinds = uniform_groups(stay, True)
        for chosen in product(range(3), repeat=len(kinds)):
            level = {layer.name: one for one, kind in zip(chosen, kinds, strict=True) for layer in kind}
            price = 500 - sum(block.cost for block in ranked[:count])
            price -= sum(layer.saves(layer.levels[level[layer.name]]) for layer in stay)
            lost = sum(losses[block.name][1] for block in ranked[:count])
            every.append((price, lost + sum(losses[layer.name][level[layer.name]] for layer in stay)))
    for limit in range(min(price for price, _ in every), 501, 7):
        number, found = best_point(spaces, limit)
        assert spaces[number].left(found) <= limit
        assert spaces[number].predicted(found) == pytest.approx(min(lost for price, lost in every if price <= limit))


def test_levels_of_a_block_cost_less_and_lose_more_one_after_the_other():
    slots = [Slot(("a",), (3, 2, 1), (30, 20, 10), (0.0, 0.5, 0.6)), Slot(("b",), (2, 1), (8, 4), (0.0, 0.1))]
    joint = with_removal(slots, Block("block", 0, ("a", "b"), 40), 0.65)
    assert joint.costs == (40, 36, 30, 20, 0)
    assert joint.losses == pytest.approx((0.0, 0.1, 0.5, 0.6, 0.65))
    assert joint.kept[-1] == {"a": 0, "b": 0, "block": 0}
    assert joint.kept[0] == {"a": 3, "b": 2}
    assert (cost([joint], (3,)), loss([joint], (3,))) == (20, 0.6)
    assert Frontier([joint]).within(29) == (3,)
    free = with_removal(slots, Block("block", 0, ("a", "b"), 40), 0.0)
    assert free.costs == (40, 0)
