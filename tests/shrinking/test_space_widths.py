"""What a search keeps where layers stay alike: multiples that quantisers like, and KV heads that can be divided."""

import pytest

import billhook as bh
from billhook.pruning.amount import Amount, multiple_of
from billhook.pruning.target import RatioSearch
from billhook.shrinking.modules import PrunableModule, find_modules
from billhook.shrinking.space import round_channels
from kit import shrinks
from kit.families import llama, tokens

WIDE = {"intermediate_size": 1536, "num_key_value_heads": 8, "num_hidden_layers": 2}


def allowed_of(kind, alike=True, **amount):
    search = RatioSearch(llama(**WIDE), Amount(params=0.7, **amount))
    return {layer.allowed for layer in find_modules(search, "params", alike) if layer.kind == kind}


@pytest.mark.parametrize(("given", "allowed"), [
    ({}, (8, 4, 2, 1)), ({"alike": False}, (8, 7, 6, 5, 4, 3, 2, 1)), ({"round_to": 1}, (8, 7, 6, 5, 4, 3, 2, 1)),
])  # fmt: skip
def test_attentions_that_stay_alike_keep_kv_heads_that_can_be_divided(given, allowed):
    assert allowed_of("head", **given) == {allowed}


def test_channels_are_multiples_by_which_none_is_far_away():
    assert allowed_of("channel") == {tuple(range(1536, 0, -32))}  # 32 is at most 3 % of 1,536, and 64 is not
    assert allowed_of("channel", alike=False) == {tuple(range(1536, 0, -32))}
    assert allowed_of("channel", round_to=1) == {tuple(range(1536, 0, -1))}
    assert allowed_of("channel", round_to=256) == {tuple(range(1536, 0, -256))}


def test_what_the_budget_leaves_becomes_a_larger_multiple_if_that_is_near():
    layer = PrunableModule(("a",), "channel", 1536, tuple(range(1536, 0, -32)), 1)
    heads = PrunableModule(("b",), "head", 300, tuple(range(300, 0, -1)), 1)
    # 3 % of them are 46: 256 takes 32 of 1,312, 128 takes 32 of 1,184, 64 takes 32 of the other two
    for number, rounded in {1312: 1280, 1248: 1216, 1184: 1152, 1120: 1088, 1152: 1152, 1536: 1536, 0: 0}.items():
        assert round_channels([layer, heads], {"a": number, "b": 299}) == {"a": rounded, "b": 299}
    assert round_channels([layer], {"b": 2}) == {"b": 2}


def test_what_is_rounded_down_is_what_the_budget_leaves_and_not_what_may_be_kept():
    one, other = (PrunableModule((name,), "channel", 1536, tuple(range(1536, 0, -32)), 10) for name in "ab")
    kept = {"a": 1120, "b": 1120}
    for spare, left in {
        0: 1088,
        20 * 14: 1088,
        20 * 15: 1120,
        20 * 26: 1120,
        10**6: 1120,
    }.items():  # 1,088 is 47 less than 1,120 and 15
        assert round_channels([one, other], kept, spare) == {"a": left, "b": left}
    assert round_channels([one, other], {"a": 1120, "b": 0}, 10 * 14) == {"a": 1088, "b": 0}  # of which the other has gone
    assert round_channels([one, other], {"a": 1120, "b": 0}, 10 * 15) == {"a": 1120, "b": 0}


@pytest.mark.nightly
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_a_model_within_its_budget(layers):
    model = llama(**WIDE)
    batches = [{"input_ids": tokens(6, 20)} for _ in range(4)]
    limit = int(0.8 * model.num_parameters())
    shrunk = shrinks.shrink(
        model, batches, params=0.8, layers=layers, generations=0, repair=None, importance=bh.importance.WeightNorm()
    )
    assert shrunk.left == model.num_parameters() <= limit
    widths = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    assert all(multiple_of(width) >= 32 for width in widths)
    if layers == "uniform":
        (width,) = widths
        assert {layer.self_attn.k_proj.out_features // 4 for layer in model.model.layers} <= {8, 4, 2, 1}
        note = f"channels: {width:,} (a multiple of {multiple_of(width)})"
        assert note in shrunk.plan.widths
        assert f"  {note}" in shrunk.text().splitlines()
