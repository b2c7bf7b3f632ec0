"""From ratios and targets to plans: exact counts, exact promises, nothing more than needed, and whatever is refused."""

import json
import math
import re
from dataclasses import asdict
from unittest import mock

import pytest
import torch

import billhook as bh
from billhook.importance.baselines import RandomUnits
from billhook.model.costs import costs_of
from billhook.model.shape import shape_of
from billhook.pruning.amount import Amount
from billhook.pruning.planning import plan_from_search
from billhook.pruning.target import Baseline, RatioSearch, first_within
from billhook.units.find import find_units, of_kind
from kit.families import ATTENTIONS, MLPS, build, llama, t5, tokens
from kit.removal import make
from kit.shaped import bert, gpt2


def lost(plan):
    return {name: plan.before[name][0] - plan.after[name][0] for name in plan.before}


def scored(model, amount, first=None):
    """Units that may be removed, random scores of them, and the plan that they lead to."""
    search = RatioSearch(model, amount) if first is None else RatioSearch(model, amount).part(amount, first)
    units = search.removable()
    scores = bh.score(model, units, RandomUnits(), per=amount.per)
    return units, scores, plan_from_search(search, scores=scores)


class TestRatios:
    @pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 1 / 3, 0.99])
    def test_of_each_layer_rounded_down(self, ratio):
        plan = bh.plan(llama(intermediate_size=50), RandomUnits(), channels=ratio)
        assert lost(plan) == dict.fromkeys(MLPS, math.floor(ratio * 50 + 1e-9))

    def test_of_all_layers(self):
        model = llama(num_hidden_layers=3)
        _, scores, plan = scored(model, Amount(channels=0.3, ranking="global"))
        found = lost(plan)
        assert sum(found.values()) == math.floor(0.3 * 3 * 48)
        flat = sorted((float(value), name, unit) for name, own in scores.items() for unit, value in enumerate(own))
        expected = {(name, unit) for _, name, unit in flat[: math.floor(0.3 * 3 * 48)]}
        assert {(name, unit) for name, own in plan.units.items() for unit in own} == expected
        least = bh.plan(model, RandomUnits(), amount=bh.Amount(channels=0.9, ranking="global", min_units=4))
        assert min(after[0] for after in least.after.values()) >= 4

    @pytest.mark.parametrize(("multiple", "stay"), [(1, 34), (4, 36), (5, 35)])
    def test_widths_are_multiples_and_the_best_of_what_goes_stays(self, multiple, stay):
        model = llama()
        _, scores, plan = scored(model, Amount(channels=0.3, residual=0.25, round_to=multiple))
        assert all(plan.after[name] == (stay,) for name in MLPS)
        assert plan.after[""] == (min(-(-24 // multiple) * multiple, 32),)
        for name in MLPS:
            assert plan.units.get(name, []) == sorted(scores[name].argsort()[: 48 - stay].tolist())

    def test_multiples_that_leave_nothing_to_go(self):
        with pytest.raises(ValueError, match=r"channels=0.3 \(round_to=16\) removes no unit from any module"):
            bh.plan(llama(), RandomUnits(), amount=bh.Amount(channels=0.3, round_to=16))

    def test_heads_of_grouped_queries(self):
        plan = bh.plan(llama(), RandomUnits(), heads=0.5)
        assert all(plan.after[name] == (4, 4) for name in ATTENTIONS)
        plan = bh.plan(llama(), RandomUnits(), kv_heads=0.5)
        assert all(plan.after[name] == (4, 2) for name in ATTENTIONS)
        one = llama(num_key_value_heads=1)
        assert all(bh.plan(one, RandomUnits(), heads=0.25).after[name] == (6, 1) for name in ATTENTIONS)
        with pytest.raises(ValueError, match=r"kv_heads=0.5 removes no unit from any module"):
            bh.plan(one, RandomUnits(), kv_heads=0.5)
        each = llama(num_key_value_heads=8)
        for name in ("heads", "kv_heads"):
            assert all(bh.plan(each, RandomUnits(), amount=bh.Amount(**{name: 0.25})).after[own] == (6, 6) for own in ATTENTIONS)

    def test_first_and_last_blocks_of_each_stack_stay(self):
        plan = bh.plan(
            llama(num_hidden_layers=5),
            RandomUnits(),
            amount=bh.Amount(channels=0.5, kv_heads=0.5, first=2, last=1),
        )
        assert {int(name.split(".")[2]) for name, count in lost(plan).items() if count} == {2, 3}
        model = t5()
        plan = bh.plan(model, RandomUnits(), amount=bh.Amount(channels=0.5, first=1))
        assert lost(plan) == {name: 24 * (".block.1." in name) for name in find_units(model, ["channel"])}
        assert lost(bh.plan(model, RandomUnits(), amount=bh.Amount(residual=0.5, first=2)))[""] == 16  # a stream is of no block
        with pytest.raises(ValueError, match=r"channels=0.5: all are in protected blocks"):
            bh.plan(llama(), RandomUnits(), amount=bh.Amount(channels=0.5, first=1, last=1))

    def test_layers_that_share_a_bias_lose_the_same_heads(self):
        plan = bh.plan(t5(), RandomUnits(), heads=0.5)
        for stack in ("encoder", "decoder"):
            own = [heads for name, heads in plan.units.items() if name.startswith(stack) and "SelfAttention" in name]
            assert own[0] == own[1]
            assert len(own[0]) == 2

    def test_experts(self):
        plan = bh.plan(build("mixtral"), bh.importance.WeightNorm(), experts=0.5)
        assert all(plan.after[name] == (2,) for name in MLPS)
        with pytest.raises(ValueError, match=r"each token uses 2\. Keep at least 2"):
            bh.plan(build("mixtral"), bh.importance.WeightNorm(), experts=0.75)


TARGETS = [("params", 0.7), ("bytes", 60_001), ("flops", 0.7), ("kv_cache_bytes", 0.5)]


class TestTargets:
    @pytest.mark.daily("params-0.7-layer", "kv_cache_bytes-129-global")
    @pytest.mark.parametrize(("target", "asked", "ranking"), [
        *((*one, "layer") for one in TARGETS), ("params", 15_000, "global"), ("kv_cache_bytes", 129, "global"),
    ])  # fmt: skip
    def test_what_is_promised_is_achieved_and_is_enough(self, target, asked, ranking):
        model = llama()
        before = costs_of(model)
        plan = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(ranking=ranking, **{target: asked}))
        bh.apply(model, plan)
        assert plan.costs == (before, costs_of(model))
        assert plan.parameters == (before.params, model.num_parameters())
        said = bh.summary(model)
        assert (said.params, said.flops, said.kv_cache_bytes) == (
            plan.costs[1].params, plan.costs[1].flops, plan.costs[1].kv_cache_bytes,
        )  # fmt: skip
        limit = int(asked * getattr(before, target)) if isinstance(asked, float) else asked
        assert getattr(plan.costs[1], target) <= limit

    @pytest.mark.nightly
    @pytest.mark.parametrize("name", ["vit", "convnext"])
    def test_operations_of_an_image(self, name):
        model = make(name)
        before = costs_of(model)
        plan = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(flops=0.8))
        bh.apply(model, plan)
        assert plan.costs == (before, costs_of(model))
        assert 0 < plan.costs[1].flops <= 0.8 * before.flops
        assert " FLOPs per image (" in str(plan)

    @pytest.mark.parametrize(
        ("target", "asked", "first"), [*((*one, 0) for one in TARGETS if one[0] != "flops"), ("params", 0.75, 1)]
    )
    def test_one_unit_fewer_in_each_place_would_not_be(self, target, asked, first):
        model = llama(num_hidden_layers=2 + first)
        units, _, plan = scored(model, Amount(**{target: asked}, first=first))
        limit = RatioSearch(model, Amount(**{target: asked}, first=first)).limit(target)
        kind = "head" if target == "kv_cache_bytes" else "channel"
        places = [name for name, one in of_kind(units, kind).items() if name in plan.units]
        assert len({plan.after[name] for name in places}) == 1
        fewer = dict(plan.units)
        for name in places:
            own = plan.units[name]
            kv_of = units[name].kv_of
            fewer[name] = own[1:] if kind == "channel" else [head for head in own if kv_of[head] != kv_of[own[0]]]
        twin = llama(num_hidden_layers=2 + first)
        bh.apply(twin, bh.pruning.plan_units(twin, fewer, ["head", "channel"]))
        assert getattr(costs_of(twin), target) > limit >= getattr(plan.costs[1], target)

    @pytest.mark.parametrize(("target", "asked"), [("params", 0.85), ("bytes", 0.7), ("flops", 0.8)])
    def test_channels_alone_go_while_half_of_them_are_enough(self, target, asked):
        model = llama(intermediate_size=96)
        alone = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(**{target: asked}, round_to=1))
        told = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(**{target: asked}, kv_heads=0.0, round_to=1))
        assert alone.units == told.units
        assert alone.units.keys() == set(MLPS)

    def test_where_they_are_not_heads_go_too(self):
        model = llama(intermediate_size=96)
        least = bh.plan(model, bh.importance.WeightNorm(), channels=0.5).parameters[1]
        at = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(params=least, round_to=1))
        below = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(params=int(0.97 * least), round_to=1))
        assert all(at.after[name] == (48,) for name in MLPS)
        assert all(at.after[name] == (8, 4) for name in ATTENTIONS)
        assert all(48 < below.after[name][0] < 96 for name in MLPS)
        assert all(below.after[name][1] < 4 for name in ATTENTIONS)

    @pytest.mark.daily("t5-kv_cache_bytes")
    @pytest.mark.parametrize(("make_one", "target"), [
        (bert, "params"), (gpt2, "kv_cache_bytes"), (t5, "kv_cache_bytes"), (lambda: build("mixtral"), "kv_cache_bytes"),
        (lambda: llama(num_key_value_heads=8), "params"), (lambda: build("qwen3", tie_word_embeddings=True), "params"),
    ])  # fmt: skip
    def test_of_other_families(self, make_one, target):
        model = make_one()
        now = getattr(costs_of(model), target)
        plan = bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(**{target: 0.75}))
        bh.apply(model, plan)
        assert plan.costs[1] == costs_of(model)
        assert getattr(plan.costs[1], target) <= int(0.75 * now)

    def test_ratios_beside_it(self):
        model = llama()
        plan = bh.plan(model, bh.importance.WeightNorm(), params=0.6, kv_heads=0.5, residual=0.25)
        assert all(plan.after[name] == (4, 2) for name in ATTENTIONS)
        assert plan.after[""] == (24,)
        bh.apply(model, plan)
        assert costs_of(model) == plan.costs[1]
        rounded = bh.plan(llama(), bh.importance.WeightNorm(), amount=bh.Amount(params=0.6, round_to=8))
        assert all(rounded.after[name][0] % 8 == 0 for name in MLPS)

    @pytest.mark.parametrize(("target", "first"), [("params", 1), ("bytes", 0), ("kv_cache_bytes", 1)])
    def test_what_cannot_be_reached_says_what_can(self, target, first):
        model = llama(num_hidden_layers=3)
        before = shape_of(model)
        with pytest.raises(ValueError, match=rf"{target}=1 \(1\) is out of reach. Reachable: ") as refusal:
            bh.plan(model, RandomUnits(), amount=bh.Amount(first=first, **{target: 1}))
        least, most = (
            int(number.replace(",", ""))
            for number in re.search(r"Reachable: ([\d,]+) to ([\d,]+)\.", str(refusal.value)).groups()
        )
        raised = "the budget" if target == "kv_cache_bytes" else "the budget or residual="
        assert str(refusal.value).endswith(f". Raise {raised}, or use bh.shrink, which also removes blocks")
        assert most == getattr(costs_of(model), target)
        assert shape_of(model) == before
        plan = bh.plan(model, RandomUnits(), amount=bh.Amount(first=first, **{target: least}))
        assert getattr(plan.costs[1], target) == least
        with pytest.raises(ValueError, match="is out of reach"):
            bh.plan(model, RandomUnits(), amount=bh.Amount(first=first, **{target: least - 1}))

    def test_what_is_there_already_or_cannot_be_told(self):
        now = llama().num_parameters()
        with pytest.raises(ValueError, match=f"params={now} is met already: the model has {now:,}"):
            bh.plan(llama(), RandomUnits(), params=now)
        with pytest.raises(ValueError, match="kv_cache_bytes=0.5 cannot be measured for BertForMaskedLM"):
            bh.plan(bert(), RandomUnits(), amount=bh.Amount(kv_cache_bytes=0.5))


def test_the_first_cost_within_a_limit_is_found_in_few_steps():
    curved = (1 + 1000 * torch.rand(1000) ** 9).cumsum(0).flip(0).tolist()
    for costs, most in ((list(range(7000, 0, -7)), 5), (curved, 26)):
        for expected in range(0, 1000, 9):
            cost = mock.Mock(side_effect=costs.__getitem__)
            assert first_within(1000, cost, costs[expected]) == expected
            assert cost.call_count <= most
        assert first_within(1000, costs.__getitem__, costs[-1] - 0.1) is None


class TestRefused:
    @pytest.mark.parametrize(("arguments", "match"), [
        ({}, "nothing to remove: set a ratio"),
        ({"channels": 0.0}, "nothing to remove"),
        ({"channels": 1.0}, r"channels=1.0 must be a fraction of these units in \[0, 1\)"),
        ({"heads": 0.5, "kv_heads": 0.5}, "heads=0.5 and kv_heads=0.5 cannot be combined"),
        ({"params": 0.5, "flops": 0.5}, "params and flops cannot be combined"),
        (
            {"params": 0.5, "kv_heads": 0.1, "channels": 0.1},
            r"params=0.5 cannot be met: it removes only KV heads \(with their query heads\) and channels\. Leave heads= and "
            r"kv_heads=, or channels=, unset\.$",
        ),
        (
            {"kv_cache_bytes": 0.5, "heads": 0.1},
            r"kv_cache_bytes=0.5 cannot be met: it removes only KV heads \(with their query heads\)\. Leave heads= and kv_heads= "
            r"unset\.$",
        ),
        ({"params": 1.5}, "params=1.5 must be a whole number above 0, or a fraction"),
        ({"params": 0}, "params=0 must be a whole number above 0"),
        ({"channels": 0.5, "ranking": "block"}, "ranking='block' must be one of layer, global"),
        ({"channels": 0.5, "round_to": 0}, "round_to=0 must be a whole number of at least 1"),
        ({"channels": 0.5, "first": -1}, "first=-1 must be a whole number of at least 0"),
        ({"channels": 0.01}, "channels=0.01 removes no unit from any module"),
        ({"experts": 0.5}, "experts=0.5: the model has no prunable units"),
        ({"channels": 0.9, "min_units": 40}, "would remove 43 of 48 channels of model.layers.0.mlp. At most 8 can be removed"),
    ])  # fmt: skip
    def test_arguments(self, arguments, match):
        model = llama()
        before = shape_of(model)
        with pytest.raises(ValueError, match=match):
            bh.plan(model, RandomUnits(), amount=bh.Amount(**arguments))
        assert shape_of(model) == before

    def test_what_data_must_tell(self):
        model = llama()
        with pytest.raises(ValueError, match="batches=None: BertForMaskedLM does not generate text .*Pass batches"):
            bh.plan(bert(), channels=0.5)
        with pytest.raises(ValueError, match="batches: OutputNorm needs at least one batch"):
            bh.plan(model, batches=[], channels=0.5)
        with pytest.raises(ValueError, match="returns no loss for inputs input_ids. Add labels, or pass loss="):
            bh.plan(bert(), bh.Taylor(), [{"input_ids": tokens()}], channels=0.5)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="batch 0"):
            bh.plan(model, bh.Taylor(), [{"input_ids": tokens()}], channels=0.5)
        with pytest.raises(ValueError, match="NaN or infinite"):
            bh.plan(model, bh.importance.WeightNorm(), channels=0.5)

    def test_with_data(self):
        model = llama().train()
        state, random_state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
        batches = [{"input_ids": tokens()}]
        random_state = torch.get_rng_state()
        plan = bh.plan(model, batches=batches, channels=0.25, heads=0.5, residual=0.25)
        assert lost(plan) == dict.fromkeys(MLPS, 12) | dict.fromkeys(ATTENTIONS, 4) | {"": 8}
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(p, state[name]) and p.grad is None for name, p in model.named_parameters())


class TestParts:
    """What goes in parts comes to the whole, and a part that is less than a unit waits."""

    @staticmethod
    def in_parts(model, amount, progress):
        first, found = Baseline.of(RatioSearch(model, amount)), []
        first = Baseline(**json.loads(json.dumps(asdict(first))))  # as it was saved
        for share in progress:
            due = first.part(RatioSearch(model, amount), share)
            found.append(due is not None)
            if due is not None:
                bh.apply(model, scored(model, due.amount, first.counts)[-1])
        assert first.part(RatioSearch(model, amount), progress[-1]) is None
        return found

    @pytest.mark.daily("amount0-progress0", "amount5-progress5")
    @pytest.mark.parametrize(("amount", "progress"), [
        ({"channels": 0.3}, (0.1, 0.35, 0.36, 1.0)), ({"channels": 0.3, "kv_heads": 0.5, "residual": 0.29}, (0.5, 1.0)),
        ({"heads": 0.5, "channels": 0.5, "round_to": 8}, (0.3, 1.0)), ({"channels": 0.6, "first": 1}, (0.25, 1.0)),
        ({"params": 0.6}, (0.5, 1.0)), ({"kv_cache_bytes": 0.5}, (0.4, 1.0)),
    ])  # fmt: skip
    def test_come_to_the_whole(self, amount, progress):
        whole, model = llama(), llama()
        amount = Amount(**amount)
        plan = scored(whole, amount)[-1]
        limit = None if amount.target is None else RatioSearch(whole, amount).limit(amount.target)
        self.in_parts(model, amount, progress)
        if amount.target is None:
            kinds = ["head", "channel", "residual"]
            assert {name: one.count() for name, one in find_units(model, kinds).items()} == {
                name: plan.after.get(name, (one.count(),))[0] for name, one in find_units(whole, kinds).items()
            }
            assert costs_of(model) == plan.costs[1]
        else:
            target = amount.target
            assert getattr(costs_of(model), target) <= limit

    def test_a_part_that_is_less_than_a_unit_waits(self):
        assert self.in_parts(llama(), Amount(kv_heads=0.5), (0.25, 0.5, 0.75, 1.0)) == [False, True, False, True]
        assert self.in_parts(llama(), Amount(heads=0.5), (0.5, 0.75, 1.0)) == [False, False, True]  # one of each KV head at once
        steps = self.in_parts(llama(), Amount(channels=0.5, round_to=16), (0.25, 0.5, 0.75, 1.0))
        assert steps == [False, False, True, False]  # 48, 48, 32: of 24 that are asked for at the end
        assert self.in_parts(llama(), Amount(channels=0.5), (0.0, 0.01, 1.0)) == [False, False, True]
