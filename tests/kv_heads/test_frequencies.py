"""Slots of a KV head go to the frequencies where the heads that it replaces keep the most, and any class may load the result."""

import copy
import itertools

import pytest
import torch
from greenlet import getcurrent, greenlet
from transformers import AutoModelForCausalLM, PhimoeConfig, PhimoeForCausalLM

import billhook as bh
from billhook.engine.batches import Run
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.convert import equal_heads
from billhook.kv_heads.frequencies import Band, Rotation, Slots, allot, bands_within
from billhook.kv_heads.methods import SVD
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.plan import ModelPlan
from billhook.model.rotary import longrope, rope_parameters, rotating_with, set_rope_parameters
from billhook.model.shape import Shape, set_shape, shape_of
from kit import families
from kit.families import llama, tokens

WIDTH = 16
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH, "vocab_size": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}


def rotation(*frequencies, rest=()):
    pairs = tuple((n, n + len(frequencies)) for n in range(len(frequencies)))
    return Rotation(frequencies, 1.0, pairs, rest)


def batches():
    return [{"input_ids": tokens(4, 24)} for _ in range(3)]


@torch.no_grad()
def with_keys_at(model, frequencies):
    """Keys of all heads have only the pairs of these frequencies, each head its own."""
    pairs = torch.tensor(frequencies)
    keep = torch.cat([pairs, pairs + WIDTH // 2])
    for layer in model.model.layers:
        rows = layer.self_attn.k_proj.weight.view(4, WIDTH, -1)
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[keep] = False
        rows[:, gone] = 0
    return model


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e4}, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
def test_heads_that_use_a_quarter_of_the_frequencies_lose_no_key(rope):
    """Four heads with 2 of 8 pairs each fill the 8 slots of one, although no frequency would hold more than one pair before."""
    dense, ids, lost = with_keys_at(llama(**HEADS, rope_parameters=dict(rope)), [1, 6]), tokens(), {}
    for way in ("free", "fixed"):
        attentions = Attentions(dense, {f"model.layers.{n}.self_attn": 1 for n in range(len(dense.model.layers))})
        new = equal_heads(attentions, SVD(frequencies=way, tolerance=0), [(batch, None) for batch in batches()], None)
        keys = {name: value for name, value in new.values.items() if "q_proj" in name or "k_proj" in name}
        changed = copy.deepcopy(dense)
        if new.rope is not None:
            set_rope_parameters(changed, new.rope)
        with torch.no_grad():
            for name, value in keys.items():
                changed.get_parameter(name).copy_(value)
            lost[way] = float((changed(ids).logits - dense(ids).logits).abs().max())
        if way == "free":
            before = dense.model.rotary_emb.inv_freq[[1, 6]]
            torch.testing.assert_close(changed.model.rotary_emb.inv_freq, before.repeat_interleave(4))
            assert changed.model.rotary_emb.attention_scaling == dense.model.rotary_emb.attention_scaling
    assert lost["free"] < 1e-5 < 1e-3 < lost["fixed"]


def test_bands_keep_every_frequency_within_the_angle_and_are_as_wide_as_they_may_be():
    frequencies = [10 ** (-n / 4) for n in range(16)]
    for angle in (0.0, 1e-3, 1e-2, 0.1):
        bands = bands_within(rotation(*frequencies), angle)
        assert sorted(itertools.chain.from_iterable(band.pairs for band in bands)) == list(range(16))
        for band in bands:
            assert max(abs(frequencies[pair] - band.frequency) for pair in band.pairs) <= angle * (1 + 1e-9)
        assert bands[0].frequency == 0 or all(frequency > angle for frequency in frequencies)
        ends = [[frequencies[pair] for pair in band.pairs] for band in bands if band.frequency]
        assert all(max(faster) - min(slower) > 2 * angle for slower, faster in itertools.pairwise(ends))
    assert bands_within(rotation(*frequencies), 0.0) == tuple(Band((n,), frequencies[n]) for n in reversed(range(16)))
    assert [band.pairs for band in bands_within(rotation(0.3, 0.3, 0.1), 0.0)] == [(2,), (0, 1)]


def test_slots_go_where_the_sum_of_what_is_kept_is_largest():
    """Against all ways to share out the slots."""
    turning = rotation(1.0, 0.5, 0.1, 0.0)
    bands = (Band((3,), 0.0), Band((2,), 0.1), Band((0, 1), 0.75))
    spectra = [torch.rand(6).sort(descending=True).values for _ in bands[:2]] + [torch.rand(6).sort(descending=True).values]

    def kept(counts):
        still, *turned = zip(spectra, counts, strict=True)
        return float(still[0][: 2 * still[1]].sum() + sum(one[:count].sum() / 2 for one, count in turned))

    ways = [way for way in itertools.product(range(4), range(7), range(7)) if sum(way) == 4]
    slots = allot(turning, bands, spectra)
    assert kept(slots.counts) == max(map(kept, ways))
    assert len(slots.frequencies) == 4
    assert slots.frequencies == sorted(slots.frequencies, reverse=True)
    new = [positions for _, new in slots.mixings for positions in (*new.real, *new.imaginary)]
    old = [positions for old, _ in slots.mixings for positions in (*old.real, *old.imaginary)]
    assert sorted(new) == sorted(old) == list(range(8))


def test_dimensions_that_do_not_rotate_share_those_of_the_slowest_pairs():
    turning = rotation(1.0, 0.01, rest=(4, 5))
    slots = allot(turning, bands_within(turning, 0.02), [torch.tensor([9.0, 8.0, 5.0, 5.0]), torch.tensor([4.0, 1.0])])
    assert slots.counts == (1, 1)
    assert slots.mixings[-1][1].real == (4, 5, 1, 3)
    still = Slots(turning, bands_within(turning, 0), (1, 1)).mixings[-1]
    assert still[0].real == still[1].real == (4, 5)


def test_the_spectrum_is_what_heads_of_any_rank_lose():
    """The mean square of what scores miss, with keys and queries drawn to have the moments."""
    generator = torch.Generator().manual_seed(0)
    heads, width, rank = 3, 4, 5
    keys = torch.randn(2000, heads, width, generator=generator, dtype=torch.float64) * torch.rand(width, generator=generator)
    queries = torch.randn(2000, heads, width, generator=generator, dtype=torch.float64)
    metric = torch.einsum("nja,njb->jab", queries, queries) / 2000
    moments = torch.einsum("nia,njb->iajb", keys, keys) / 2000
    one, spectrum = SVD().reconstruct(metric, moments, rank), SVD().spectrum(metric, moments)
    through = torch.einsum("jab,nb->nja", one.basis, torch.einsum("iab,nib->na", one.shared, keys))
    missed = torch.einsum("nja,mja->nmj", queries, keys - through).square().mean((0, 1)).sum()
    assert float(missed) == pytest.approx(float(spectrum[rank:].sum()), rel=1e-6)


def converted(**options):
    model = llama(**HEADS, max_position_embeddings=64, tie_word_embeddings=False)
    plan = bh.convert_kv_heads(model, 1, SVD(**options), batches())
    return model, plan


def test_plain_transformers_loads_and_generates_the_same(tmp_path):
    model, plan = converted(tolerance=0.5)
    assert plan.rope == model.config.rope_parameters
    assert {plan.rope["rope_type"], model.config.num_key_value_heads} == {"longrope", 1}
    bh.save(model, tmp_path)
    plain, long = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens(2, 96)
    assert type(plain).__module__.startswith("transformers.")
    assert not hasattr(plain.config, "billhook")
    with torch.no_grad():
        for ids in (long[:, :12], long):  # also beyond max_position_embeddings
            assert torch.equal(plain(ids).logits, model(ids).logits)
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected = model.generate(long[:1, :60], **settings)
        for more in ({}, {"cache_implementation": "static", "disable_compile": True}, {"assistant_model": plain}):
            assert torch.equal(plain.generate(long[:1, :60], **settings, **more), expected)


def test_the_shape_and_the_plan_carry_the_frequencies():
    model, plan = converted(tolerance=0.5)
    other = llama(**HEADS, max_position_embeddings=64, tie_word_embeddings=False)
    dense, ids = shape_of(other), tokens()
    set_shape(other, Shape.from_dict(shape_of(model).to_dict()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    set_shape(other, dense)  # and back
    assert rope_parameters(other) == {"rope_type": "default", "rope_theta": 10000.0}
    again = ModelPlan.from_json(plan.to_json(), other)
    assert (again.rope, again.shape.rope) == (plan.rope, plan.rope)
    with pytest.raises(ValueError, match=r"shape\.rope is .* but must be the rope_parameters of a config"):
        Shape.from_dict(dense.to_dict() | {"rope": {"rope_type": "default", "theta": {}}})
    with pytest.raises(ValueError, match="plan: rope must be the rope_parameters of a config"):
        ModelPlan.from_json(plan.to_json() | {"rope": {"rope_theta": 1.0}}, other)


def test_where_nothing_is_lost_frequencies_do_not_become_equal():
    """Heads that are equal but for a complex factor of each pair, as a band would not be."""
    model = llama(**HEADS).double()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = linear.weight.view(4, WIDTH, -1)
                heads.copy_(heads[:1] * torch.tensor([1.0, -0.5, 2.0, 3.0]).view(4, 1, 1))
    ids = tokens()
    before = model(ids).logits
    plan = bh.convert_kv_heads(model, 1, SVD(tolerance=0.5), batches())
    assert plan.rope == {}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-9)


def test_a_converted_model_is_converted_again():
    model = llama(**HEADS)
    first = bh.convert_kv_heads(model, 2, SVD(context=16, tolerance=0.5), batches())
    again = bh.convert_kv_heads(model, 1, SVD(tolerance=0), batches())
    before, after = (1 / (torch.tensor(rope["short_factor"]) * 1e4 ** (torch.arange(8) / 8)) for rope in (first.rope, again.rope))
    assert all(float((before - frequency).abs().min()) < 1e-6 for frequency in after)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen3", {}, "pass a norm"),
        ("gemma3_text", {"num_hidden_layers": 6, "query_pre_attn_scalar": 16}, "no rope_parameters for all layers"),
        ("llama", {"rope_parameters": DYNAMIC}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": SECTIONS}, "rope_type='default' (rope_type, rope_theta, mrope_section)"),
        ("phimoe", {}, "PhimoeForCausalLM does not accept rope_type='longrope' (KeyError: 'short_mscale')"),
        ("ministral3", {"head_dim": 8}, "Ministral3ForCausalLM does not accept rope_type='longrope' (TypeError: "),
    ],
)
def test_others_keep_their_frequencies_and_say_why(family, changes, reason):
    small = {**HEADS, "intermediate_size": 32, "num_hidden_layers": 2}
    model = PhimoeForCausalLM(PhimoeConfig(**small)) if family == "phimoe" else families.build(family, **changes)
    plan = plan_kv_heads(model, 1, SVD())
    attentions = Attentions(model, dict.fromkeys(plan.layers, 1))
    new = equal_heads(attentions, SVD(), [(batch, None) for batch in batches()], None)
    assert new.rope is None
    assert "rotary frequencies stay, because" in new.how
    assert reason in new.how


def test_layers_that_keep_their_heads_keep_the_frequencies():
    model = llama(**HEADS)
    plan = bh.convert_kv_heads(model, 1, SVD(), batches(), layers=[0])
    assert plan.rope == {}
    assert model.config.rope_parameters["rope_type"] == "default"


def test_bad_input_is_refused_before_anything_changes():
    for options, message in (
        ({"frequencies": "some"}, "frequencies='some'"),
        ({"context": 0}, "context=0"),
        ({"tolerance": 2.0}, "tolerance=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SVD(**options)
    model = llama(**HEADS, max_position_embeddings=64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="context=65 must be at most max_position_embeddings=64"):
        bh.convert_kv_heads(model, 1, SVD(context=65), batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_runs_with_other_frequencies_leave_those_beside_them_alone():
    """Runs that pause, as in a walk, each with its own frequencies."""
    model, ids, outputs = llama(**HEADS), tokens(), []
    other = copy.deepcopy(model)
    slow = longrope(model, model.model.rotary_emb.inv_freq.double() / 2)
    set_rope_parameters(other, slow)
    main = getcurrent()

    def pause(*_):
        main.switch()

    model.model.layers[0].register_forward_pre_hook(pause)
    (turned,), plain = (
        rotating_with(model, slow, [Run(lambda: outputs.append(model(ids).logits))]),
        Run(lambda: outputs.append(model(ids).logits)),
    )
    runs = [greenlet(run.visit) for run in (turned, plain, turned)]
    for _ in range(2):
        for run in runs:
            run.switch()
    expected = [other(ids).logits, model.model.layers[0]._forward_pre_hooks.clear() or model(ids).logits]
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    assert torch.equal(outputs[2], expected[0])
    assert not torch.equal(outputs[0], outputs[1])
