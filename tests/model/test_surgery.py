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
