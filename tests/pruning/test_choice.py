"""Which heads are chosen: exactly, from scores that are known."""

import functools

import pytest
import torch
import transformers

from billhook.pruning.choice import choose
from billhook.units.find import find_units
from kit.families import llama

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@functools.cache
def heads_of(kind):
    """Of a model with eight heads in two layers, or of a T5."""
    if kind == "t5":
        config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
        return find_units(transformers.T5ForConditionalGeneration(transformers.T5Config(**config)), "head")
    return find_units(llama(num_key_value_heads={"mha": 8, "gqa": 4, "mqa": 1}[kind]), "head")


def scores(*layers, names=LAYERS):
    return {name: torch.tensor(own, dtype=torch.float32) for name, own in zip(names, layers, strict=True)}


ASCENDING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
MIXED = [3.0, 0.0, 7.0, 1.0, 6.0, 2.0, 5.0, 4.0]  # 1, 3, 5, 0, 7, 6, 4, 2 from the lowest


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(0, 0), (0.1, 0), (0.124, 0), (0.125, 1), (0.25, 2), (0.3, 2), (0.374, 2), (3 / 8, 3), (0.5, 4), (0.8, 6), (0.875, 7)],
)
def test_as_many_go_in_each_layer_as_the_ratio_says_rounded_down(ratio, count):
    chosen = choose(heads_of("mha"), scores(MIXED, ASCENDING), ratio)
    order = [1, 3, 5, 0, 7, 6, 4, 2]
    assert chosen == ({LAYERS[0]: sorted(order[:count]), LAYERS[1]: list(range(count))} if count else {})


def test_over_all_layers_the_lowest_go():
    heads = heads_of("mha")
    for part in range(57):
        values = torch.randperm(16, generator=torch.Generator().manual_seed(part)).float()
        chosen = choose(heads, scores(values[:8].tolist(), values[8:].tolist()), part / 64, "global")
        expected = {LAYERS[0]: set(), LAYERS[1]: set()}
        for place in values.argsort().tolist():  # the last of a layer stays
            layer = LAYERS[place // 8]
            if sum(map(len, expected.values())) < part // 4 and len(expected[layer]) < 7:
                expected[layer].add(place % 8)
        assert chosen == {name: sorted(numbers) for name, numbers in expected.items() if numbers}, part


def test_a_ratio_that_is_no_binary_fraction_counts_exactly():
    for kept in range(1, 8):
        chosen = choose(heads_of("mha"), scores(ASCENDING, ASCENDING), 1 - kept / 8)
        assert chosen[LAYERS[0]] == list(range(8 - kept))
    wide = find_units(
        llama(hidden_size=100, num_attention_heads=100, num_key_value_heads=100, head_dim=2, num_hidden_layers=1), "head"
    )
    for ratio in (0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58):  # 100 * 0.29 is 28.999999999999996
        assert len(choose(wide, scores(range(100), names=LAYERS[:1]), ratio)[LAYERS[0]]) == round(100 * ratio)


def test_of_equal_scores_the_first_go():
    equal = scores([1.0] * 8, [1.0] * 8)
    assert choose(heads_of("mha"), equal, 0.25) == {LAYERS[0]: [0, 1], LAYERS[1]: [0, 1]}
    assert choose(heads_of("mha"), equal, 0.25, "global") == {LAYERS[0]: [0, 1, 2, 3]}
    assert choose(heads_of("mha"), equal, 0.5, "global") == {LAYERS[0]: [0, 1, 2, 3, 4, 5, 6], LAYERS[1]: [0]}
    assert choose(heads_of("gqa"), equal, 0.5) == {LAYERS[0]: [0, 2, 4, 6], LAYERS[1]: [0, 2, 4, 6]}


def test_min_heads_stay_in_each_layer():
    low, high = [0.0] * 8, [1.0] * 8
    found = heads_of("mha")
    assert choose(found, scores(low, high), 0.5, "global", min_units=3) == {LAYERS[0]: [0, 1, 2, 3, 4], LAYERS[1]: [0, 1, 2]}
    assert choose(found, scores(low, high), 0.5, "global", min_units=0, remove=False) == {LAYERS[0]: list(range(8))}
    assert choose(found, scores(low, high), 0.25, min_units=6) == {LAYERS[0]: [0, 1], LAYERS[1]: [0, 1]}
    assert choose(found, scores(low, high), 0, min_units=100) == {}
    message = r"ratio=0.5 would remove 4 of 8 heads of model.layers.0.self_attn. At most 2 can be removed: ratio=0.25"
    with pytest.raises(ValueError, match=message):
        choose(found, scores(low, high), 0.5, min_units=6)
    with pytest.raises(
        ValueError, match=r"ratio=0.5 would remove 8 of 16 heads of all layers. At most 4 can be removed: ratio=0.25"
    ):
        choose(found, scores(low, high), 0.5, "global", min_units=6)
    with pytest.raises(
        ValueError, match=r"ratio=0.9 would remove 14 of 16 heads of all layers. At most 8 can be removed: ratio=0.5"
    ):
        choose(heads_of("gqa"), scores(low, high), 0.9, "global")  # one of each KV head's two at least


def test_kv_heads_lose_as_many_query_heads_each():
    found = heads_of("gqa")  # 0 and 1 have a KV head, 2 and 3 the next
    one = [9.0, 8.0, 0.0, 1.0, 5.0, 4.0, 3.0, 3.0]
    assert choose(found, scores(one, ASCENDING), 0.5) == {LAYERS[0]: [1, 2, 5, 6], LAYERS[1]: [0, 2, 4, 6]}
    assert choose(found, scores(one, ASCENDING), 0.49) == {}  # four at once
    assert choose(found, scores(one, ASCENDING), 0.5, remove=False) == {LAYERS[0]: [2, 3, 6, 7], LAYERS[1]: [0, 1, 2, 3]}
    assert choose(found, scores(one, ASCENDING), 0.125, remove=False) == {LAYERS[0]: [2], LAYERS[1]: [0]}
    means = scores([4.0, 9.0] * 4, [0.0, 9.0, 0.0, 9.0, 0.0, 9.0, 17.0, 18.0])  # the second's lowest have 4.25 on average
    assert choose(found, means, 0.25, "global") == {LAYERS[0]: [0, 2, 4, 6]}
    assert choose(heads_of("mqa"), scores(MIXED, ASCENDING), 3 / 8) == {LAYERS[0]: [1, 3, 5], LAYERS[1]: [0, 1, 2]}


def test_kv_heads_themselves():
    found = heads_of("gqa")
    own = scores([1.0, 0.0, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0])
    assert choose(found, own, 0.5, per="kv_head") == {LAYERS[0]: [0, 1], LAYERS[1]: [2, 3]}
    assert choose(found, own, 0.5, "global", per="kv_head") == {LAYERS[0]: [0, 1, 3], LAYERS[1]: [3]}
    assert choose(found, own, 0.75, "global", 1, "kv_head", remove=False) == {LAYERS[0]: [0, 1, 3], LAYERS[1]: [1, 2, 3]}
    with pytest.raises(ValueError, match="ratio=0.9 would remove 1 of 2 heads of all layers. At most 0 can be removed: ratio=0"):
        choose(heads_of("mqa"), scores([1.0], [1.0]), 0.9, "global", 1, "kv_head")


def test_layers_that_share_a_position_bias_lose_the_same_heads():
    found = heads_of("t5")
    names = list(found)
    encoder, decoder = names[:2], [name for name in names if "decoder" in name and "Self" in name]
    cross = [name for name in names if "EncDec" in name]  # all get the zeros that the first makes
    own = dict(zip(names, torch.rand(len(names), 4, generator=torch.Generator().manual_seed(0)), strict=True))
    chosen = choose(found, own, 0.5)
    for shared in (encoder, decoder, cross):
        lowest = torch.stack([own[name] for name in shared]).mean(0).argsort()[:2].sort().values.tolist()
        assert [chosen[name] for name in shared] == [lowest] * 2
    alone = choose(found, own, 0.5, remove=False)
    assert alone == {name: own[name].argsort()[:2].sort().values.tolist() for name in names} != chosen
    for ratio in (0.1, 0.25, 0.4, 0.6):
        chosen = choose(found, own, ratio, "global")
        assert all(chosen.get(one) == chosen.get(other) for one, other in (encoder, decoder, cross))
        assert 0 <= int(24 * ratio + 1e-9) - sum(map(len, chosen.values())) <= 1  # two at once may be one too many


def test_any_tensor_is_a_score():
    """In half precision, infinite, or as a gradient leaves it."""
    own = {name: torch.tensor(MIXED, dtype=torch.bfloat16, requires_grad=True) for name in LAYERS}
    assert choose(heads_of("mha"), own, 0.25) == dict.fromkeys(LAYERS, [1, 3])
    endless = scores([float("inf")] * 6 + [1.0, float("-inf")], MIXED)
    assert choose(heads_of("mha"), endless, 0.25) == {LAYERS[0]: [6, 7], LAYERS[1]: [1, 3]}
    with pytest.raises(ValueError, match="At most 2 can be removed: ratio=0.25"):
        choose(heads_of("mha"), endless, 0.5)


def test_of_blocks_with_equal_scores_the_last_go_and_the_ends_stay():
    found = find_units(llama(num_hidden_layers=6), "block")
    own = scores([0.0, 2.0, 1.0, 1.0, 1.0, 0.0], names=["model.layers"])
    orders = [[5], [0, 5], [0, 4, 5], [0, 3, 4, 5], [0, 2, 3, 4, 5]]
    assert [choose(found, own, count)["model.layers"] for count in range(1, 6)] == orders
    assert choose(found, own, 0.5)["model.layers"] == orders[2]
    assert [choose(found, own, count, ends=(2, 1))["model.layers"] for count in (1, 2, 3)] == [[4], [3, 4], [2, 3, 4]]
    with pytest.raises(ValueError, match="ratio=4 would remove 4 of 6 blocks of model.layers. At most 3 .*: ratio=3"):
        choose(found, own, 4, ends=(2, 1))
    with pytest.raises(ValueError, match="At most 4 can be removed"):
        choose(found, own, 5, min_units=2)


@pytest.mark.parametrize(("arguments", "match"), [
    ({"ratio": 1}, r"ratio=1 must be a fraction of the units in \[0, 1\)"),
    ({"ratio": -0.1}, r"ratio=-0.1 must be"),
    ({"ratio": float("nan")}, r"ratio=nan must be"),
    ({"ranking": "model"}, "ranking='model' must be one of layer, global"),
    ({"min_units": -1}, "min_units=-1 must be a whole number of at least 0"),
    ({"min_units": 0}, "min_units=0 must be at least 1 if units are removed"),
    ({"per": "layer"}, "per='layer' must be one of head, kv_head"),
])  # fmt: skip
def test_arguments_that_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        choose(heads_of("gqa"), scores(ASCENDING, ASCENDING), **{"ratio": 0.5} | arguments)


@pytest.mark.parametrize(("own", "per", "match"), [
    (scores(ASCENDING, ASCENDING[1:]), "head", r"layers.1.self_attn needs one score for each of its 8 heads \(per='head'\)"),
    (scores(ASCENDING, names=LAYERS[:1]), "head", "model.layers.1.self_attn needs one score for each of its 8 heads"),
    (scores(ASCENDING, ASCENDING), "kv_head", r"layers.0.self_attn needs one score for each of its 4 heads \(per='kv_head'\)"),
    (scores(ASCENDING, [float("nan"), *ASCENDING[1:]]), "head", "model.layers.1.self_attn has a score that is NaN"),
])  # fmt: skip
def test_scores_that_are_refused(own, per, match):
    with pytest.raises(ValueError, match=match):
        choose(heads_of("gqa"), own, 0.5, per=per)
