"""The best method is the one that loses least on held-out text, and repair brings a trained model nearer to what it was."""

import copy
import functools

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama import modeling_llama

import billhook as bh
from billhook.engine.batches import Run
from billhook.engine.comm import SINGLE_PROCESS
from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.convert import Attentions, best_method
from billhook.kv_heads.distance import EqualHeads, distance_between
from billhook.kv_heads.layout import find_projections, read
from billhook.kv_heads.methods import SVD, Aligned, Auto, Mean, method_of
from billhook.kv_heads.symmetry import Symmetries
from billhook.model.rotary import set_rope_parameters
from billhook.repairs.repair import RepairConfig
from billhook.tracing.trace import trace
from kit import kv_zoo
from kit.families import build, llama, tokens
from kit.kv_zoo import mixed, model_of, with_stacks
from kit.losses import embedded_text
from kit.ranks import Ranks

METHODS = [Mean(), Aligned(), SVD(), Aligned("similar"), SVD("similar")]


def attentions_of(model, groups, comm=SINGLE_PROCESS):
    return Attentions(model, dict.fromkeys(find_projections(model, trace(model)), groups), comm)


def runs_of(model, parts):
    return [Run(lambda ids=ids: model(input_ids=ids, labels=ids).loss) for ids in parts]


@functools.cache
def trained():
    """The embedded model, a Llama with 8 KV heads, of which one layer is to be converted, and text, in part unseen."""
    model = bh.load("tiny").float().eval()
    attentions = attentions_of(model, 4)
    attentions.projections = dict(list(attentions.projections.items())[1:2])
    return attentions, embedded_text("train", 8).split(2), embedded_text("validation", 4)


def changed(model, new):
    """A copy with other parameters and rotary frequencies."""
    model = copy.deepcopy(model)
    if new.rope is not None:
        set_rope_parameters(model, new.rope)
    with torch.no_grad():
        for name, value in new.values.items():
            model.get_parameter(name).copy_(value)
    return model


def equal(attentions, method, runs):
    ((_, new),) = attentions.reconstructed([method], runs)
    return new


@torch.no_grad()
def distance(one, other, ids):
    return float((one(ids).logits - other(ids).logits).norm() / other(ids).logits.norm())


@torch.no_grad()
def divergence(one, other, ids):
    p, q = (torch.distributions.Categorical(logits=model(ids).logits.double()) for model in (one, other))
    return float(torch.distributions.kl_divergence(p, q).mean())


def test_auto_takes_what_stays_nearest_on_held_out_batches(monkeypatch):
    attentions, parts, _ = trained()
    (number,) = RepairConfig().held_out_batches(len(parts))
    held_out, compared, distances = parts[number], [], attentions.distances
    monkeypatch.setattr(attentions, "distances", lambda news, *rest: compared.extend(news) or distances(news, *rest))
    chosen, losses = best_method(attentions, METHODS, runs_of(attentions.model, parts), None)
    assert list(losses) == METHODS == list(Auto().candidates)
    with torch.no_grad():
        for method, new in zip(losses, (new for new in compared if new.values), strict=True):  # not those of frequencies alone
            near = divergence(attentions.model, changed(attentions.model, new), held_out)
            assert near == pytest.approx(losses[method], rel=1e-4)
    seen = runs_of(attentions.model, [part for part in parts if part is not held_out])
    for name, value in equal(attentions, Aligned(), seen).values.items():
        torch.testing.assert_close(value, compared[1].values[name])
    assert chosen == min(losses, key=losses.get)
    assert losses[SVD()] < losses[Aligned()] < losses[Mean()]
    assert losses[chosen] <= losses[SVD()]
    assert [str(one) for one in METHODS[2::2]] == ["svd", "svd, similar heads grouped"]


@pytest.mark.daily("gpt2")
@pytest.mark.parametrize("family", ["llama", "bert", "bart", "gpt2", "phi3"])
def test_auto_never_passes_over_what_is_exact(family):
    """Heads that are mixes of one another, which `svd` alone undoes; on so few random tokens the loss knows no better."""
    for seed in range(3):
        model = model_of(family)
        attentions = attentions_of(model, 2)
        for name, place in attentions.projections.items():
            with_stacks(model, place, mixed(read(model, place), attentions.symmetries[name], 2))
        torch.manual_seed(seed)
        runs = runs_of(model, [tokens(4, 12) for _ in range(4)])
        chosen, distances = best_method(attentions, METHODS, runs, None)
        assert distances[chosen] < 1e-9 < distances[Mean()], (seed, distances)
        assert isinstance(chosen, SVD)


def test_the_distance_of_states_and_of_what_counts():
    a, b, tokens = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[True, False, True], [True, True, False]])
    assert distance_between(a, a) == distance_between({"logits": a}, {"logits": a}) == 0
    expected = float((a - b)[tokens].square().mean() / a[tokens].square().mean())
    assert distance_between((a,), (b,), tokens) == pytest.approx(expected)
    p, q = (SequenceClassifierOutput(logits=one) for one in (a, b))
    by_hand = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=one[tokens]) for one in (a, b)))
    assert distance_between(p, q, tokens) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    a[..., 0] = b[..., 0] = -torch.inf  # which some models never predict
    assert 0 < distance_between(SequenceClassifierOutput(logits=a), SequenceClassifierOutput(logits=b)) < torch.inf
    one = SequenceClassifierOutput(logits=a[..., 1:2])  # a regression, of which there is nothing to choose
    assert distance_between(one, SequenceClassifierOutput(logits=b[..., 1:2])) > 0
    with pytest.raises(ValueError, match="a str, which contains no floating-point tensor to compare"):
        distance_between("a", "b")


@pytest.mark.daily("svd")
@pytest.mark.parametrize("start", ["mean", "svd"])
def test_repair_brings_a_trained_model_nearer_to_what_it_was_on_text_it_has_not_seen(start):
    attentions, parts, unseen = trained()
    model, runs = attentions.model, runs_of(attentions.model, parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = equal(attentions, method_of(start), runs)
    better = attentions.repaired(new, runs, RepairConfig())
    assert better.values.modules.keys() == new.values.modules.keys() | set(attentions.downs)
    assert len(attentions.downs) == 4
    far, near = (distance(changed(model, one), model, unseen) for one in (new, better))
    assert near < (0.97 if start == "svd" else 0.75) * far
    for place in attentions.projections.values():  # what makes heads is as it was given: still equal in their groups
        assert torch.equal(better.values[f"{place.v.linear}.weight"], new.values[f"{place.v.linear}.weight"])
        stacks = read(changed(model, better), place)
        torch.testing.assert_close(stacks.k[0::2], stacks.k[1::2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_repair_works_where_each_block_ends_in_a_norm_and_with_gpt2s_linears(family):
    """A post-norm model has no stream in which a linear could catch up with those before it."""
    model, parts = kv_zoo.build(family), [tokens(8, 24) for _ in range(5)]
    attentions = attentions_of(model, 4)
    assert len(attentions.downs) == 2
    runs = [Run(lambda ids=ids: model(ids).logits.sum()) for ids in parts]
    new = equal(attentions, Mean(), runs)
    for repair in (RepairConfig(), RepairConfig(compensate=False)):
        better = attentions.repaired(new, runs, repair)
        far, near = (distance(changed(model, one), model, tokens(8, 24)) for one in (new, better))
        assert near < 0.9 * far


def test_a_module_that_is_called_in_every_layer_can_be_converted_but_not_repaired():
    model = kv_zoo.build("albert")
    attentions, runs = (
        attentions_of(model, 4),
        [Run(lambda: model(tokens(4, 12)).logits.sum()) for _ in range(3)],
    )
    new = equal(attentions, SVD(), runs)
    assert distance(changed(model, new), model, tokens()) > 0
    with pytest.raises(ValueError, match=r"repair: .*attention.* is called several times in a run, so it cannot be compared"):
        attentions.repaired(new, runs, RepairConfig())


def test_the_distance_is_the_mean_of_batches_and_leaves_the_model_as_it_is():
    model, parts = llama(), [tokens(2, 9) for _ in range(3)]
    attentions = attentions_of(model, 2)
    new = equal(attentions, Mean(), [])
    before, same = copy.deepcopy(model.state_dict()), EqualHeads(LazyTensors({}))
    for autocast in (False, True):  # which keeps the weights that it has cast
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            found = [attentions.distances([one], runs_of(model, parts))[0] for one in (same, new, same)]
            expected = [divergence(model, changed(model, new), ids) for ids in parts]
        assert found == pytest.approx([0, sum(expected) / 3, 0], rel=1e-5)
        assert found[1] > 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_method_that_loses_a_number_that_is_none_is_not_taken():
    model = llama()
    attentions = attentions_of(model, 1)
    plain = attentions.distances
    attentions.distances = lambda news, runs: [float("nan")] if not calls.append(0) and len(calls) == 1 else plain(news, runs)
    calls = []
    chosen, losses = best_method(attentions, METHODS, runs_of(model, [tokens() for _ in range(3)]), None)
    assert list(losses) == METHODS[:3]  # of one group alone there is no choice
    assert losses[Mean()] != losses[Mean()]
    assert chosen != Mean()


def test_ranks_choose_the_same_and_are_refused_together():
    parts = [tokens(2, 9) for _ in range(4)]
    models = [copy.deepcopy(model) for model in [llama()] * 2]

    def one(rank, reduce, cut):
        runs = runs_of(models[rank], cut[rank])
        return best_method(attentions_of(models[rank], 2, reduce), METHODS, runs, None)

    alone = best_method(attentions_of(models[0], 2), METHODS, runs_of(models[0], parts), None)
    for cut in ((parts[::2], parts[1::2]), ([], parts)):
        first, second = Ranks(2).run(functools.partial(one, cut=cut))
        assert first == second
        assert first[0] == alone[0]
        assert first[1] == pytest.approx(alone[1], rel=1e-4)

    def refused(rank, reduce):
        with pytest.raises(ValueError, match=rf"'auto' needs at least 2, because some are held out; got {[1, 0][rank]}"):
            one(rank, reduce, (parts[:1], []))
        return True

    assert Ranks(2).run(refused) == [True, True]


def test_refusals_say_what_works():
    bloom = attentions_of(kv_zoo.build("bloom"), 4)
    with pytest.raises(ValueError, match=r"grouping='similar' reorders heads, .*h.0.self_attention.*Use grouping='consecutive'"):
        bloom.check(SVD("similar"))
    with pytest.raises(
        ValueError, match="method='svd': svd needs attention through transformers' interface; use aligned without"
    ):
        bloom.check(SVD())
    runs = runs_of(bloom.model, [tokens() for _ in range(3)])
    assert list(best_method(bloom, METHODS, runs, None)[1]) == METHODS[:2]
    fixed = attentions_of(kv_zoo.build("deberta"), 4)
    assert set(fixed.symmetries.values()) == {Symmetries((), (), False, interface=False)}
    for start in ("aligned", "svd"):
        with pytest.raises(
            ValueError, match=rf"method='{start}': no change of basis preserves the output of deberta.*'mean' works"
        ):
            fixed.check(method_of(start))
    fixed.check(Mean())
    attentions_of(build("qwen3"), 2).check(SVD("similar"))  # of which values are free
    with pytest.raises(ValueError, match=r"'auto' needs at least 2, because some are held out; got 1"):
        best_method(bloom, METHODS, runs[:1], None)


def attend(self, hidden_states, position_embeddings, *args, **kwargs):
    """Llama's attention without transformers' attention interface, as earlier versions wrote it."""
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    k, v = (modeling_llama.repeat_kv(part, self.num_key_value_groups) for part in (k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_that_is_not_seen_has_aligned_heads_by_its_weights(heads, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", attend)
    model, batches = kv_zoo.build("llama"), [{"input_ids": tokens(2, 9)} for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="svd needs attention through transformers' interface; use aligned without batches"):
        bh.convert_kv_heads(model, heads, "svd", batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    chosen, losses = best_method(attentions_of(model, 2), METHODS, runs_of(model, [tokens(2, 9) for _ in range(3)]), None)
    assert not any(isinstance(method, SVD) for method in losses)
    assert Aligned() in losses
    blind, seen = copy.deepcopy(model), copy.deepcopy(model)
    bh.convert_kv_heads(blind, heads, "aligned")
    bh.convert_kv_heads(seen, heads, "aligned", batches)
    assert all(torch.equal(value, seen.state_dict()[name]) for name, value in blind.state_dict().items())
    assert bh.convert_kv_heads(model, heads, "auto", batches).after == heads


def test_matching_refuses_blocks_that_rotate_keys_themselves():
    model = llama()
    model.model.layers[1].rotary = model.model.rotary_emb
    new = EqualHeads(LazyTensors({}), {"rope_type": "default", "rope_theta": 1e4})
    with pytest.raises(ValueError, match="match: the blocks of LlamaForCausalLM rotate keys themselves. Use SVD"):
        attentions_of(model, 2).repaired(new, [], RepairConfig(match=bh.criteria.BlockMatching()))


def test_passes_and_bytes_of_methods():
    attentions, repair = attentions_of(llama(), 2), RepairConfig()
    matched = RepairConfig(match=bh.criteria.BlockMatching())
    assert [attentions.passes(Mean(), how) for how in (None, repair, matched)] == [1, 3, 4]
    assert [attentions.passes(SVD(), how) for how in (None, repair, matched)] == [3, 5, 6]
    assert attentions.passes(SVD(frequencies="fixed"), repair) == 3
    assert [attentions.bytes(method) for method in (Mean(), Aligned("similar"))] == [2 * 8 * 4 * 8**2, 2 * 8 * 2 * 16**2]
    assert [attentions_of(llama(), groups).may_group for groups in (1, 2, 4)] == [False, True, False]
    assert not attentions_of(kv_zoo.build("bloom"), 2).may_group
