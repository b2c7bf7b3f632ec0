import pytest
import torch

from billhook.model.surgery import Change, change_values, update_optimizers
from kit.families import llama, tokens

HALF = Change(lambda w: w[: len(w) // 2], lambda _, v: v[: len(v) // 2])


def replace_parameters(model, changes, optimizers=()):
    update_optimizers(change_values(model, changes), optimizers)


def trained(optimizer_class=torch.optim.AdamW):
    model = llama(tie_word_embeddings=True).train()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return model, optimizer


def test_a_tied_parameter_changes_under_all_its_names():
    model, optimizer = trained()
    old = model.model.embed_tokens.weight
    replace_parameters(model, {"model.embed_tokens.weight": HALF}, [optimizer])
    new = model.model.embed_tokens.weight
    assert new is model.lm_head.weight
    assert new.shape == (32, 32)
    assert sum(p is new for g in optimizer.param_groups for p in g["params"]) == 1
    assert not any(p is old for g in optimizer.param_groups for p in g["params"])
    assert optimizer.state[new]["exp_avg"].shape == new.shape


def test_gradients_are_cleared_and_dtype_and_device_stay():
    model = llama().to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name).grad = torch.ones_like(model.get_parameter(name))
    replace_parameters(model, {name: Change(lambda w: w.float() * 2, lambda _, v: v)})
    assert model.get_parameter(name).grad is None
    assert model.get_parameter(name).dtype == torch.bfloat16
    assert model.get_parameter(name).is_leaf


def test_values_that_are_not_finite_are_refused_before_anything_changes():
    model, optimizer = trained()
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    before = [model.get_parameter(name) for name in names]
    changes = {names[0]: HALF, names[1]: Change(lambda w: w / 0, lambda _, v: v)}
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: the new values are not finite"):
        replace_parameters(model, changes, [optimizer])
    assert all(model.get_parameter(name) is old for name, old in zip(names, before, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_may_start_anew_for_a_parameter(kind):
    """Its next step is that of one which is made then."""
    name = "model.layers.0.mlp.up_proj.weight"
    model, optimizer = trained(kind)
    replace_parameters(model, {name: Change(lambda w: w * 2, None)}, [optimizer])
    new = model.get_parameter(name)
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    start = new.detach().clone()
    optimizer.step()
    after = new.detach().clone()
    with torch.no_grad():
        new.copy_(start)
    kind([new], lr=1e-2).step()
    assert torch.equal(new, after)
    assert not torch.equal(new, start)
