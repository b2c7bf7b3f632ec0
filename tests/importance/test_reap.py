"""Scores of experts against loops over tokens, and what their removal leaves of the routing."""

import copy

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Llama4ForCausalLM, Llama4TextConfig

import billhook as bh
from billhook.importance.score import make_run, score
from kit.families import build, llama, tokens
from kit.ranks import Ranks

SCORES = [bh.importance.REAP(), bh.importance.RoutingFrequency(), bh.importance.GateMass()]
BATCHES = [{"input_ids": tokens(3, 9)} for _ in range(4)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("qwen3_moe")


def grouped(**changes):
    """A mixture whose router first chooses one of two groups of four experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    routing = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    routing |= changes
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **routing, qk_nope_head_dim=8, v_head_dim=8)).eval()


@torch.no_grad()
def by_hand(model, batches):
    """The tokens of a batch, and of each layer the expert, gate, and norm of the expert's output of each routed token."""
    routed = [[] for _ in model.model.layers]

    def listen(layer, experts, args):
        hidden, index, gates = args
        counts = (mask.flatten() if (mask := batch.get("attention_mask")) is not None else torch.ones(len(hidden))).tolist()
        for token, counted in enumerate(counts):
            for place in range(index.shape[1]) if counted else ():
                expert = int(index[token, place])
                gate, up = linear(hidden[token], experts.gate_up_proj[expert]).chunk(2)
                output = linear(silu(gate) * up, experts.down_proj[expert])
                routed[layer].append((token, expert, float(gates[token, place]), float(output.norm())))

    hooks = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            hooks.append(layer.mlp.experts.register_forward_pre_hook(lambda *args, number=number: listen(number, *args)))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [part for part in routed if part]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("importance", SCORES, ids=str)
def test_scores_are_sums_over_routed_tokens(model, importance, padding):
    batches, total = BATCHES, 4 * 27
    if padding:
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[1, 5:], mask[2, :2] = 0, 0
        batches, total = [batch | {"attention_mask": mask} for batch in BATCHES], 4 * 21
    found = list(bh.score(model, bh.find_units(model, "expert"), importance, batches).values())
    for scores, routed in zip(found, by_hand(model, batches), strict=True):
        for expert in range(4):
            own = [(gate, norm) for _, number, gate, norm in routed if number == expert]
            expected = {
                "REAP": sum(gate * norm for gate, norm in own) / max(1, len(own)),
                "RoutingFrequency": len(own) / total,
                "GateMass": sum(gate for gate, _ in own) / total,
            }
            assert float(scores[expert]) == pytest.approx(expected[type(importance).__name__], rel=1e-4, abs=1e-9)


def test_units_of_groups_are_the_places_in_a_group():
    torch.manual_seed(1)
    model = grouped()
    units = bh.find_units(model, "expert")
    assert [layer.count() for layer in units.values()] == [4]
    (scores,) = bh.score(model, units, SCORES[1], BATCHES).values()
    (routed,) = by_hand(model, BATCHES)
    counted = [sum(expert % 4 == place for _, expert, _, _ in routed) / (2 * 108) for place in range(4)]
    assert scores.tolist() == pytest.approx(counted)
    plan = bh.plan(model, None, BATCHES, experts=0.25)
    bh.apply(model, plan)
    assert model.config.n_routed_experts == 6
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.shape == (6,)
    assert model(**BATCHES[0]).logits.isfinite().all()


@pytest.mark.parametrize(("taken", "groups", "least"), [(4, 1, 4), (6, 2, 3), (3, 2, 2)])
def test_the_chosen_groups_keep_as_many_experts_as_a_token_takes(taken, groups, least):
    model = grouped(num_experts_per_tok=taken, topk_group=groups)
    with pytest.raises(ValueError, match=rf"left with {least - 1} of 4 experts, .* Keep at least {least}"):
        bh.pruning.plan_units(model, list(range(5 - least)), "expert")
    if least < 4:
        assert bh.pruning.plan_units(model, list(range(4 - least)), "expert").after == {"model.layers.1.mlp": (least,)}


def test_experts_with_a_forward_pass_of_their_own_are_ranked_by_taylor():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads)).eval()
    assert bh.plan(model, None, BATCHES, experts=0.25).units == bh.plan(model, bh.Taylor(), BATCHES, experts=0.25).units
    with pytest.raises(ValueError, match="the experts of .*feed_forward have a forward pass of their own. Use Taylor"):
        bh.plan(model, SCORES[0], BATCHES, experts=0.25)


@pytest.mark.parametrize("importance", SCORES, ids=str)
def test_ranks_add_up(model, importance):
    units, copies = bh.find_units(model, "expert"), [copy.deepcopy(model) for _ in range(2)]
    whole = score(model, units, importance, BATCHES)

    def scored(rank, comm):
        own = [make_run(copies[rank], units, batch) for batch in (BATCHES[1:] if rank else BATCHES[:1])]
        return score(copies[rank], units, importance, own, reduce=comm)

    first, second = Ranks(2).run(scored)
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], expected)
        assert torch.equal(first[name], second[name])


def test_the_default_is_reap_and_the_plan_says_what_routing_loses(model):
    plan = bh.plan(model, None, BATCHES, experts=0.5)
    units, scores = bh.find_units(model, "expert"), bh.score(model, bh.find_units(model, "expert"), SCORES[0], BATCHES)
    assert plan.units == {name: sorted(scores[name].argsort()[:2].tolist()) for name in units}
    kept = mass = orphans = count = 0
    for removed, routed in zip(plan.units.values(), by_hand(model, BATCHES), strict=True):
        mass += sum(gate for _, _, gate, _ in routed)
        kept += sum(gate for _, expert, gate, _ in routed if expert not in removed)
        pairs = [(first[1], second[1]) for first, second in zip(routed[::2], routed[1::2], strict=True)]
        orphans, count = orphans + sum(set(pair) <= set(removed) for pair in pairs), count + len(pairs)
    (change,) = plan.routing
    assert bh.ModelPlan.from_json(plan.to_json(), model).routing == plan.routing
    assert change.gate_mass == pytest.approx(kept / mass)
    assert change.orphans == pytest.approx(orphans / count)
    assert change.unreached == 0
    assert 0.0 <= change.agreement <= 1.0
    assert "tokens without experts" in plan.text()
    assert bh.plan(model, None, BATCHES[:1], experts=0.5).routing[0].agreement is None
    assert bh.plan(model, bh.Taylor(), BATCHES, experts=0.5).routing == ()


def test_streamed_experts_get_the_same_scores(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    streamed = bh.stream(tmp_path / "whole", tmp_path / "out")
    plan = bh.plan(streamed, None, BATCHES, experts=0.25)
    assert plan.units == bh.plan(model, None, BATCHES, experts=0.25).units
    assert plan.routing == bh.plan(model, None, BATCHES, experts=0.25).routing


def test_refusals_say_what_works(model):
    before = model.config._experts_implementation
    with pytest.raises(ValueError, match=r"importance=REAP\(\) scores experts, not heads. Use OutputNorm or Taylor"):
        bh.score(llama(), bh.find_units(llama(), "head"), SCORES[0], BATCHES)
    with pytest.raises(ValueError, match="batches: REAP needs at least one batch with non-padding tokens"):
        bh.score(model, bh.find_units(model, "expert"), SCORES[0], [])
    with pytest.raises(ValueError, match="would be left with 1 of 4 experts, but each token uses 2. Keep at least 2"):
        bh.plan(model, None, BATCHES, experts=0.75)
    assert model.config._experts_implementation == before
    assert not any(name.endswith("experts.0") for name, _ in model.named_modules())
