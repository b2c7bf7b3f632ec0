import pytest
import torch

from billhook.kv_heads.convert import check_ready, turned_weights
from billhook.kv_heads.methods import Aligned, Auto, Mean, method_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.kv_heads.pooling import approach
from billhook.model.surgery import assign_values, changed_names
from kit.families import build, tokens
from kit.kv_zoo import build as zoo

K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("how", ["mean", "first"])
def test_n_moves_of_equal_parts_lead_to_the_pool_whatever_happens_in_between(how):
    """Independent of pooling: heads as a dimension of their own."""
    model = build("llama")
    plan, weight = plan_kv_heads(model, 2), model.get_parameter(K)
    heads = weight.detach().view(2, 2, 4, 32).clone()
    target = heads.mean(1, keepdim=True) if how == "mean" else heads[:, :1]
    approach(model, plan.parameters, 1 / 4, method_of(how).pool)
    torch.testing.assert_close(weight.view(2, 2, 4, 32), heads + (target - heads) / 4)
    approach(model, plan.parameters, 1 / 3, method_of(how).pool)
    torch.testing.assert_close(weight.view(2, 2, 4, 32), heads + (target - heads) / 2)
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    moved = weight.detach().view(2, 2, 4, 32).clone()
    approach(model, plan.parameters, 1 / 2, method_of(how).pool)
    approach(model, plan.parameters, 1, method_of(how).pool)
    ends = weight.view(2, 2, 4, 32)
    assert torch.equal(ends[:, 0], ends[:, 1])
    torch.testing.assert_close(ends[:, 0], moved.mean(1) if how == "mean" else moved[:, 0])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", [Aligned(), Aligned("similar"), Mean("similar")], ids=str)
@pytest.mark.parametrize("seen", [True, False])
def test_turned_heads_change_nothing_in_the_model(family, method, seen):
    model, ids = build(family), tokens()
    before = model(ids).logits
    names = plan_kv_heads(model, 2).layers
    pairs = [({"input_ids": tokens(), "labels": tokens()}, None) for _ in range(2 if seen else 0)]
    weights = turned_weights(model, dict.fromkeys(names, 2), method, pairs)
    assert torch.equal(model(ids).logits, before)
    assign_values(model, weights, [])
    assert len(changed_names(model, weights)) == 0
    torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_aligned_heads_lie_nearer_to_their_mean():
    def apart(model):
        heads = model.get_parameter(K).detach().view(2, 2, 4, 32)
        return float((heads - heads.mean(1, keepdim=True)).norm())

    model = build("llama")
    before, names = apart(model), plan_kv_heads(model, 2).layers
    assign_values(model, turned_weights(model, dict.fromkeys(names, 2), Aligned()), [])
    assert apart(model) < 0.95 * before


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Rprop])
def test_the_optimizer_starts_anew_for_what_has_changed_and_for_nothing_else(kind):
    """As one that is made at that moment does."""
    model, ids = build("llama").train(), tokens()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **options)

    def step(*optimizers):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for one in optimizers:
            one.step()

    step(optimizer)
    weight, other = model.get_parameter(K), model.get_parameter(K.replace("k_proj", "v_proj"))
    kept, value = {key: one.clone() for key, one in optimizer.state[other].items()}, other.detach().clone()
    assign_values(model, {K: weight.detach() * 2, K.replace("k_proj", "v_proj"): value}, [optimizer])
    assert all(torch.equal(optimizer.state[other][key], one) for key, one in kept.items())
    start = weight.detach().clone()
    step(optimizer)
    after = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(start)
    kind([weight], lr=1e-2, **options).step()
    assert torch.equal(weight, after)
    assert not torch.equal(weight, start)


def test_values_that_are_not_finite_are_refused_before_anything_changes():
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = K.replace("k_proj", "v_proj")
    with pytest.raises(ValueError, match=f"{other}: the new values are not finite"):
        assign_values(model, {K: torch.ones(16, 32), other: torch.full((16, 32), torch.inf)}, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_that_cannot_change_places_are_refused():
    """A position bias knows heads by their number."""
    model = zoo("t5")
    check_ready(model, plan_kv_heads(model, 2, Aligned()))
    check_ready(model, plan_kv_heads(model, 2, Auto()))
    with pytest.raises(ValueError, match="grouping='similar' reorders heads"):
        check_ready(model, plan_kv_heads(model, 2, Aligned("similar")))
