"""Moments against attention by hand: probabilities, what each query head is given of each head of its group, token by token."""

import copy
import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from billhook.engine.batches import Run
from billhook.kv_heads.layout import find_projections
from billhook.model.inputs import small_inputs
from billhook.tracing.trace import trace
from kit.families import EXTRA, tokens
from kit.kv_zoo import ZOO, calls_interface, model_of, moments_of
from kit.ranks import Ranks


def case(family="llama", heads=4, queries=2, **changes):
    model = model_of(family, heads, queries, **changes)
    return model, find_projections(model, trace(model))


def run_of(model, ids, tokens=None, **more):
    return Run(lambda: model(input_ids=ids, **more).logits.sum(), tokens or {})


def close(found, expected, tolerance=1e-9):
    for name in ("keys", "values", "queries"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def hidden_states(model, ids, **more):
    """What each attention of a Llama is given, and its rotary angles."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        for layer in model.model.layers
    ]
    model(input_ids=ids, **more)
    for hook in hooks:
        hook.remove()
    return [(one["hidden_states"], one["position_embeddings"]) for one in seen]


def by_hand(attention, x, angles, allowed, counts, groups):
    """Covariances of keys, E[u u^T] and the sums of E[q q^T] of an attention like Llama's, in loops.

    `allowed` is [rows, to, from].
    """
    width = attention.head_dim
    q, k, v = (
        one(x).unflatten(-1, (-1, width)).transpose(1, 2).detach()
        for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads, each = k.shape[1], q.shape[1] // k.shape[1]
    turned, keys = apply_rotary_pos_emb(q, k, *angles)
    size = heads // groups
    found = {"keys": torch.zeros(groups, size * width, size * width), "values": torch.zeros(groups, size * width, size * width)}
    found = {name: one.double() for name, one in found.items()}
    queries, seen = torch.zeros(heads, width, width).double(), 0
    for row in range(len(x)):
        for to in range(x.shape[1]):
            if not counts[row, to]:
                continue
            seen += 1
            for group in range(groups):
                own = range(group * size, group * size + size)
                for head in range(group * size * each, (group + 1) * size * each):
                    scores = keys[row, head // each] @ turned[row, head, to] / math.sqrt(width)
                    share = scores.masked_fill(~allowed[row, to], -math.inf).softmax(0)
                    given = torch.cat([share @ v[row, other] for other in own])
                    found["values"][group] += torch.outer(given, given) / (size * each)
                    mean = torch.cat([share @ keys[row, other] for other in own])
                    for of, weight in enumerate(share):
                        apart = torch.cat([keys[row, other, of] for other in own]) - mean
                        found["keys"][group] += weight * torch.outer(apart, apart) / (size * each)
                    queries[head // each] += torch.outer(q[row, head, to], q[row, head, to])
    shape = (groups, size, width, size, width)
    return (found["keys"] / seen).view(shape), (found["values"] / seen).view(shape), queries / seen


def causal(rows, length, window=None):
    to, of = torch.arange(length)[:, None], torch.arange(length)[None]
    return ((of <= to) & (to - of < (window or length))).expand(rows, -1, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
def test_they_are_those_of_attention_computed_by_hand(family, attention, groups):
    model, places = case(family, attn_implementation=attention, **{"sliding_window": 4} if family == "mistral" else {})
    ids = tokens(2, 9)
    found = moments_of(model, places, dict.fromkeys(places, groups), [run_of(model, ids)])
    allowed = causal(2, 9, 4 if family == "mistral" else None)
    for (name, own), (x, angles) in zip(found.items(), hidden_states(model, ids), strict=True):
        expected = by_hand(model.get_submodule(name), x, angles, allowed, torch.ones(2, 9, dtype=torch.bool), groups)
        for one, other in zip((own.keys, own.values, own.queries), expected, strict=True):
            assert one.dtype == torch.float64
            close = 1e-5 if attention == "eager" else 1e-8  # of which the softmax is in float32
            torch.testing.assert_close(one, other, rtol=close, atol=close)


@pytest.mark.daily("t5", "codegen", "bloom")
@pytest.mark.parametrize("family", sorted({*ZOO, "gemma2", "gpt_oss"} - {"albert", "xglm"}))  # one module; no float64
def test_they_are_those_of_the_weights_that_the_models_own_code_returns(family, monkeypatch):
    monkeypatch.setitem(
        EXTRA,
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "experts_implementation": "eager"},
    )  # with sinks
    model, places = case(family, attn_implementation="eager")
    if not calls_interface(model):
        with pytest.raises(ValueError, match="svd needs attention through transformers' interface; use aligned without batches"):
            moments_of(model, places, dict.fromkeys(places, 2), [run_of(model, tokens(2, 7))])
        return
    inputs, calls, function_of = small_inputs(model, length=7), {}, ALL_ATTENTION_FUNCTIONS.get_interface

    def noted(function):
        def call(module, query, key, value, *args, **more):
            output, weights = function(module, query, key, value, *args, **more)
            calls[module] = weights, key, value
            return output, weights

        return call

    found = moments_of(model, places, dict.fromkeys(places, 2), [Run(lambda: model(**inputs), {})])
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *names: noted(function_of(*names)))
    with torch.no_grad():
        model(**inputs)
    seen = {name: calls[module] for name in places for module in model.get_submodule(name).modules() if module in calls}
    assert set(seen) == set(places)
    for name, (weights, keys, values) in seen.items():
        heads, queries = places[name].kv_heads, weights.shape[1] // 2
        keys, values = (tensor[:, :: tensor.shape[1] // heads] for tensor in (keys, values))
        for group in range(2):
            share, own = weights[:, group * queries : (group + 1) * queries], slice(group * heads // 2, (group + 1) * heads // 2)
            torch.testing.assert_close(found[name].keys[group], covariance(share, keys[:, own]), rtol=1e-4, atol=1e-5)
            given = torch.einsum("bhts,bjsc->bhtjc", share, values[:, own]).flatten(0, 2)
            products = torch.einsum("tia,tjb->iajb", given, given) / len(given)
            torch.testing.assert_close(found[name].values[group], products, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_and_is_not_attended_to():
    model, places = case()
    ids, mask = tokens(3, 8), torch.arange(8).expand(3, 8) < torch.tensor([[8], [5], [3]])
    linears = [rows.linear for place in places.values() for rows in (place.q, place.k, place.v, place.o)]
    counting = dict.fromkeys(linears, mask)
    run = run_of(model, ids, counting, attention_mask=mask.long())
    found = moments_of(model, places, dict.fromkeys(places, 2), [run])
    allowed = causal(3, 8) & mask[:, None]
    for (name, own), (x, angles) in zip(found.items(), hidden_states(model, ids, attention_mask=mask.long()), strict=True):
        expected = by_hand(model.get_submodule(name), x, angles, allowed, mask, 2)
        for one, other in zip((own.keys, own.values, own.queries), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    blind = moments_of(model, places, dict.fromkeys(places, 2), [run_of(model, ids, {}, attention_mask=mask.long())])
    assert not any(torch.allclose(found[name].values, blind[name].values, rtol=1e-3) for name in places)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_batches_and_ranks_add_up(family):
    model, places = case(family)
    groups, ids = dict.fromkeys(places, 2), tokens(4, 9)
    whole = moments_of(model, places, groups, [run_of(model, ids)])
    parts = moments_of(model, places, groups, [run_of(model, ids[:1]), run_of(model, ids[1:])])
    copies = [copy.deepcopy(model) for _ in range(2)]
    cuts = (ids[:3], ids[3:])

    def one(rank, reduce):
        return moments_of(copies[rank], places, groups, [run_of(copies[rank], cuts[rank])], reduce)

    for name in places:
        close(parts[name], whole[name])
        for found in Ranks(2).run(one):
            close(found[name], whole[name])


def covariance(share, keys):
    """That of keys, [rows, heads, from, width], under the attention weights of queries, [rows, query heads, to, from]."""
    mean = torch.einsum("bhts,bisa->bhtia", share, keys)
    both = torch.einsum("bhts,bisa,bjsc->bhtiajc", share, keys, keys) - torch.einsum("bhtia,bhtjc->bhtiajc", mean, mean)
    return both.flatten(0, 2).mean(0)


def test_a_cross_attention_sees_what_the_encoder_gives_and_which_of_it_counts():
    model, places = case("bart")
    ids, mask = tokens(2, 7), torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])
    name = "model.decoder.layers.1.encoder_attn"
    own, seen = model.get_submodule(name), []
    counting = {f"{name}.{linear}": mask for linear in ("k_proj", "v_proj")}
    run = run_of(model, ids, counting, attention_mask=mask.long(), decoder_input_ids=ids[:, :5])
    found = moments_of(model, places, dict.fromkeys(places, 2), [run])[name]
    hook = own.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run.forward()
    hook.remove()
    ((args, kwargs),) = seen
    x, y = args[0] if args else kwargs["hidden_states"], kwargs.get("key_value_states", args[1] if len(args) > 1 else None)
    q, k, v = (
        one(z).unflatten(-1, (4, -1)).transpose(1, 2).detach() for one, z in ((own.q_proj, x), (own.k_proj, y), (own.v_proj, y))
    )
    share = (q @ k.transpose(2, 3) / math.sqrt(own.head_dim)).masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    queries = torch.einsum("bhta,bhtc->hac", q, q) / 10
    torch.testing.assert_close(found.queries, queries)
    for group in range(2):
        pair = [2 * group, 2 * group + 1]
        torch.testing.assert_close(found.keys[group], covariance(share[:, pair], k[:, pair]))
        given = torch.einsum("bhts,bjsc->bhtjc", share[:, pair], v[:, pair]).flatten(0, 2)
        torch.testing.assert_close(found.values[group], torch.einsum("tia,tjb->iajb", given, given) / len(given))


def test_a_module_that_runs_in_every_layer_is_seen_in_every_layer():
    model, places = case("albert")
    (place,) = places.values()
    seen = {place.k.linear: [], place.q.linear: []}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: seen[name].append(output))
        for name in seen
    ]
    run = run_of(model, tokens(2, 6))
    with torch.no_grad():
        run.forward()
    for hook in hooks:
        hook.remove()
    q, k = (torch.cat(seen[rows.linear]).unflatten(2, (8, 4)).transpose(1, 2) for rows in (place.q, place.k))
    assert len(k) == 2 * 2
    share = (q @ k.transpose(2, 3) / 2).softmax(-1)
    found = moments_of(model, places, {place.name: 2}, [run])[place.name]
    expected = torch.stack([covariance(share[:, group], k[:, group]) for group in (slice(0, 4), slice(4, 8))])
    torch.testing.assert_close(found.keys, expected)


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
def test_in_bfloat16_sums_are_not_rounded(dtype):
    model, places = case()
    ids, groups = tokens(8, 32), dict.fromkeys(places, 2)
    exact = moments_of(model, places, groups, [run_of(model, ids)])
    model = model.float() if dtype == "autocast" else model.bfloat16()

    def half():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return moments_of(model, places, groups, [run_of(model, ids)])

    found = half()
    for name in places:
        for part in ("keys", "values", "queries"):
            one, other = getattr(found[name], part), getattr(exact[name], part)
            assert one.dtype == torch.float64
            assert (one - other).norm() < 0.03 * other.norm()


def test_the_model_stays_as_it_is_and_gives_what_it_gave():
    model, places = case()
    model.train()
    before, ids, given = copy.deepcopy(model.state_dict()), tokens(2, 9), []
    expected = model.eval()(ids, labels=ids).loss
    model.train()

    def loss():
        given.append(model(ids, labels=ids).loss)
        return given[-1]

    moments_of(model, places, dict.fromkeys(places, 1), [Run(loss)])
    assert torch.equal(given[0], expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(KeyError):
        moments_of(model, places, dict.fromkeys(places, 1), [Run(lambda: {}["loss"])])
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_under_autocast_the_run_itself_has_the_models_own_values():
    model, places = case()
    model, ids = model.float(), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given, plain = [], model(ids).logits
        run = Run(lambda: given.append(model(ids).logits) or given[-1].sum())
        moments_of(model, places, dict.fromkeys(places, 1), [run])
        assert torch.equal(given[0], plain)
        assert torch.equal(model(ids).logits, plain)


def test_refusals_name_the_attention():
    model, places = case()
    groups, ids = dict.fromkeys(places, 2), tokens(2, 9)
    nothing = dict.fromkeys(
        [rows.linear for place in places.values() for rows in (place.k, place.o)], torch.zeros(2, 9, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match=r"batches: model.layers.0.self_attn is not called, or receives no non-padding token"):
        moments_of(model, places, groups, [run_of(model, ids, nothing)])
    with pytest.raises(ValueError, match=r"batches: model.layers.0.self_attn is not called, or receives no non-padding token"):
        moments_of(model, places, groups, [Run(lambda: torch.zeros(()))])
    own = model.model.layers[1].self_attn
    own.k_proj.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"batches: model.layers.1.self_attn gives NaN or infinite values"):
        moments_of(model, places, groups, [run_of(model, ids)])


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_model_that_is_called_twice_in_a_run_is_seen_twice(family):
    model, places = case(family)
    groups, parts = dict.fromkeys(places, 2), [tokens(2, 9), tokens(3, 7)]
    found = moments_of(model, places, groups, [Run(lambda: [model(input_ids=ids) for ids in parts])])
    expected = moments_of(model, places, groups, [run_of(model, ids) for ids in parts])
    for name in places:
        close(found[name], expected[name])


def test_statistics_go_with_their_block(alive_sums):
    model, places = case()
    moments_of(model, places, dict.fromkeys(places, 2), [run_of(model, tokens(2, 7)) for _ in range(2)])
    assert alive_sums == [1] * len(places)
