"""KV heads that engines can divide among devices: preferred where a target leaves the choice, others named."""

import pytest
import torch

import billhook as bh
from billhook.pruning.amount import Amount, divides_among_devices, round_kv_heads
from billhook.pruning.target import RatioSearch
from kit.families import ATTENTIONS, MLPS, llama


def planned(amount, **changes):
    model = llama(**{"num_key_value_heads": 8, "intermediate_size": 100} | changes)
    units = RatioSearch(model, amount).removable()
    scores = {name: torch.arange(one.count(amount.per), dtype=torch.float32) for name, one in units.items()}
    return model, bh.plan(model, scores=scores, amount=amount)


def test_a_number_suits_if_each_device_takes_as_many_or_a_copy():
    for number in range(1, 65):
        divided = [number % devices == 0 if number >= devices else devices % number == 0 for devices in (2, 4, 8)]
        assert divides_among_devices(number) == all(divided)
    for count in (3, 8, 12, 32):
        for kept in range(1, count + 1):
            options = [number for number in range(1, count + 1) if number == count or divides_among_devices(number)]
            assert abs(round_kv_heads(kept, count) - kept) == min(abs(number - kept) for number in options)


@pytest.mark.parametrize("part", [0.85, 0.7, 0.5, 0.35])
def test_where_the_target_leaves_the_choice_they_are_preferred(part):
    model, plan = planned(Amount(params=part))
    _, exact = planned(Amount(params=part, round_to=1))
    assert plan.parameters[1] <= int(part * model.num_parameters())
    (kv_heads,) = {plan.after[name][1] for name in ATTENTIONS}
    (before,) = {exact.after[name][1] for name in ATTENTIONS}
    assert kv_heads in (8, 4, 2, 1)
    assert kv_heads == round_kv_heads(before, 8)
    assert "devices" not in str(plan)


def test_where_channels_cannot_make_up_for_it_they_are_as_the_target_needs():
    amount = Amount(params=0.72, min_units=4)
    _, exact = planned(Amount(params=0.72, min_units=4, round_to=1), intermediate_size=8)
    model, plan = planned(amount, intermediate_size=8)
    assert plan.parameters[1] <= int(0.72 * model.num_parameters())
    assert {exact.after[name] for name in ATTENTIONS} == {plan.after[name] for name in ATTENTIONS}


def test_others_are_named():
    _, plan = planned(Amount(kv_heads=0.25))
    line = "  6 KV heads cannot be divided among 2, 4, and 8 devices; 1, 2, 4, or a multiple of 8 can"
    assert str(plan).splitlines()[-1] == line
    assert line in str(planned(Amount(kv_cache_bytes=0.8))[1]).splitlines()
    assert "devices" not in str(planned(Amount(kv_heads=0.5))[1])
    assert "devices" not in str(planned(Amount(heads=0.5), num_key_value_heads=4)[1])  # KV heads stay as they are
    assert MLPS[0] not in plan.units
