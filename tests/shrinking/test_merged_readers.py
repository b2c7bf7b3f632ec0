"""What reads merged heads is refitted before it is compared with what reads those that are left after a removal."""

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Batch, Run
from billhook.pruning.amount import Amount
from billhook.shrinking import pooling as merging
from billhook.shrinking.divergence import split_batches
from billhook.shrinking.measurement import measure
from billhook.shrinking.pooling import HeadPooling
from billhook.shrinking.scope import SearchScope
from kit import shrinks
from kit.families import build, tokens

TINY = bh.RepairConfig(ridges=[0.01])


def texts():
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(6, 20)}, name) for name in ("one", "two") * 3]


@torch.no_grad()
def model_of(family="llama"):
    """Four KV heads in each of two attentions, which pairs of them share in part."""
    torch.manual_seed(1)
    model = build(family)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.o_proj.weight.mul_(8)
        for linear in (attention.k_proj, attention.v_proj):
            heads = linear.weight.view(4, -1, 32)
            heads[1::2] = heads[::2] + 0.5 * heads.std() * torch.randn_like(heads[::2])
    return model


def measured(model, repair, batches=None):
    fitted, held_out = split_batches(batches or texts())
    candidates = SearchScope.find(model, Amount(kv_cache_bytes=0.5), uniform=False)
    return measure(candidates, fitted, held_out, bh.importance.WeightNorm(), repair), fitted


def read(model, linear, batches):
    """What a linear is given, token by token, in float64."""
    found = []
    hook = model.get_submodule(linear).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(found)


@pytest.mark.daily("llama")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_gives_what_it_gave_in_the_dense_model_as_far_as_least_squares_can(family):
    model, number, kept = model_of(family), 1, 2
    work, fitted = measured(model, TINY)
    name, linear = f"model.layers.{number}.self_attn", model.model.layers[number].self_attn.o_proj
    reader = f"{name}.o_proj"
    dense, weight = read(model, reader, fitted), linear.weight.detach().double()
    found = work.cache.weights(f"{name} merged", kept)[f"{reader}.weight"].double()
    with work.cache.assembled({f"{name} merged": kept, f"{name} merged unfitted": kept}):
        given, start = read(model, reader, fitted), linear.weight.detach().double()
    owed, second = dense @ weight.t() - given @ start.t(), given.t() @ given / len(given)
    inner = second + 0.01 * torch.diag(second.diagonal())
    expected = start + torch.linalg.solve(inner, given.t() @ owed / len(given)).t()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    left = (dense @ weight.t() - given @ found.t()).square().mean()
    assert left < 0.7 * owed.square().mean()
    assert not torch.equal(found, start)


def test_less_is_lost_on_what_it_was_not_fitted_to():
    without, _ = measured(model_of(), None)
    fitted, _ = measured(model_of(), bh.RepairConfig())
    names = [f"model.layers.{number}.self_attn merged" for number in (0, 1)]
    for kept, share in ((2, 0.8), (1, 1.0)):  # of one head, no ridge helps what is held out
        assert all(fitted.cache.measured[name, kept] <= share * without.cache.measured[name, kept] for name in names)


def test_all_attentions_and_numbers_are_seen_in_one_run_of_each_batch(monkeypatch):
    runs, visit, fit = [], Run.visit, merging.refit_consumers
    monkeypatch.setattr(merging, "refit_consumers", lambda *given: runs.clear() or fit(*given))
    monkeypatch.setattr(Run, "visit", lambda self: runs.append(self) or visit(self))
    monkeypatch.setattr(HeadPooling, "choose", lambda self, divergence, layers, losses, uniform: (layers, losses))
    work, fitted = measured(model_of(), TINY)
    assert {(key, kept) for key, kept in work.cache.errors if key.endswith("merged")} == {
        (f"model.layers.{number}.self_attn merged", kept) for number in (0, 1) for kept in (2, 1)
    }
    assert len(runs) == len(fitted)


def test_padding_does_not_count_and_the_model_stays():
    model, batches = model_of(), texts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(2)
    padded = []
    for batch in batches:
        more = torch.cat([batch["input_ids"], tokens(6, 8)], 1)
        padded.append(Batch({"input_ids": more, "attention_mask": torch.arange(28).lt(20).long().expand(6, 28)}, batch.source))
    plain, same = (measured(model, TINY, own)[0].cache for own in (batches, padded))
    name = "model.layers.0.self_attn"
    for kept in (2, 1):
        one, other = (own.weights(f"{name} merged", kept)[f"{name}.o_proj.weight"] for own in (plain, same))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(one) or one._forward_pre_hooks for one in model.modules())


@pytest.mark.nightly
def test_a_library_on_disk_goes_on_with_what_is_refitted_and_what_is_not(tmp_path, monkeypatch):
    options = {"kv_cache_bytes": 0.5, "importance": bh.importance.WeightNorm(), "repair": TINY, "generations": 0}
    first = shrinks.shrink(model_of(), texts(), variant_cache=tmp_path, **options)
    monkeypatch.setattr(merging, "gather", None)
    monkeypatch.setattr(merging, "refit_consumers", None)
    second = shrinks.shrink(model_of(), texts(), variant_cache=tmp_path, **options)
    assert first.merged
    assert first.to_json() == second.to_json()
