"""Variants of layers: their errors against a plain least squares, and their damage against a model that is really cut."""

import re

import pytest
import torch
from safetensors.torch import save_file

import billhook as bh
from billhook.engine.batches import Batch, Run, runs_of
from billhook.importance.score import make_run
from billhook.pruning.amount import Amount
from billhook.pruning.target import RatioSearch
from billhook.shrinking import variants as module
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.measurement import config_losses, probes
from billhook.shrinking.modules import find_modules, removed_units
from billhook.shrinking.scope import Progress
from billhook.shrinking.variants import VariantCache, cache_key, check_token_count, fill_cache
from kit.families import build, llama, tokens

TINY = bh.RepairConfig(ridges=[1e-4])


class Made:
    """A model with its layers, scores and library."""

    def __init__(self, model, batches, repair=TINY, folder=None):
        self.model, self.search = model, RatioSearch(model, Amount(params=0.5))
        self.units, self.modules = self.search.units, find_modules(self.search, "params")
        self.scores = bh.score(model, self.units, bh.importance.WeightNorm(), per="kv_head")
        runs = [make_run(model, self.units, batch) for batch in batches]
        self.cache = VariantCache(model, folder, {})
        fill_cache(self.cache, self.modules, self.units, self.scores, {}, runs, repair, Progress())

    def removed(self, layer, kept):
        return removed_units(layer, self.units, self.scores, kept)

    def layer(self, kind):
        return next(layer for layer in self.modules if layer.kind == kind)


def texts():
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(6, 30)}, name) for name in ("one", "two", "one", "two")]


@torch.no_grad()
def read(model, linear, batches):
    """What a linear reads, float64, by source."""
    given = {}
    for batch in batches:
        hook = model.get_submodule(linear).register_forward_pre_hook(
            lambda _, args, source=batch.source: given.setdefault(source, []).append(args[0].flatten(0, 1).double())
        )
        model(batch["input_ids"])
        hook.remove()
    return {source: torch.cat(own) for source, own in given.items()}


@pytest.mark.parametrize("kind", ["channel", "head"])
def test_errors_are_those_of_least_squares_on_the_other_batches(kind):
    model, batches = llama(), texts()
    made = Made(model, batches)
    layer = made.layer(kind)
    reader = made.units[layer.name].readers[0]
    (choosing,), weight = bh.RepairConfig().held_out_batches(len(batches)), model.get_submodule(reader).weight.detach().double()
    (held_out,) = read(model, reader, batches[choosing : choosing + 1]).values()
    fit = torch.cat(list(read(model, reader, [batch for batch in batches if batch is not batches[choosing]]).values()))
    for kept in layer.levels[1:]:
        lost = torch.tensor(made.removed(layer, kept)[layer.name])
        stays = ~torch.isin(torch.from_numpy(made.units[layer.name].index), lost)
        kept_inputs = fit[:, stays]
        pull = (1e-4 * kept_inputs.square().sum(0)).sqrt().diag()  # towards the old weights, as more rows to fit
        rows = torch.cat([kept_inputs, pull])
        solution = torch.linalg.lstsq(rows, torch.cat([fit @ weight.T, pull @ weight.T[stays]])).solution
        target = held_out @ weight.T
        error = float((target - held_out[:, stays] @ solution).square().sum() / target.square().sum())
        assert made.cache.errors[layer.name, kept] == pytest.approx(error, rel=1e-4, abs=1e-7)


def test_weights_are_fitted_to_all_batches_and_read_nothing_that_is_lost():
    model, batches = build("phi"), texts()  # with biases
    made = Made(model, batches)
    layer = made.layer("channel")
    reader, kept = made.units[layer.name].readers[0], layer.levels[3]
    own = made.cache.weights(layer.name, kept).of_module(reader)
    lost = made.removed(layer, kept)[layer.name]
    assert not own["weight"][:, lost].any()
    inputs = torch.cat(list(read(model, reader, batches).values()))
    linear = model.get_submodule(reader)
    target = inputs @ linear.weight.detach().double().T + linear.bias.detach().double()
    stays = [number for number in range(48) if number not in lost]
    with_one = torch.cat([inputs[:, stays], torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(with_one, target).solution
    assert torch.allclose(own["weight"][:, stays].double().T, solution[:-1], atol=2e-3)
    assert torch.allclose(own["bias"].double(), solution[-1], atol=2e-3)


def test_without_repair_units_are_only_cut():
    model = llama()
    made = Made(model, texts(), None)
    layer = made.layer("channel")
    (reader,) = made.units[layer.name].readers
    kept = layer.levels[2]
    own = made.cache.weights(layer.name, kept).of_module(reader)["weight"]
    expected = model.get_submodule(reader).weight.detach().clone()
    expected[:, made.removed(layer, kept)[layer.name]] = 0
    assert torch.equal(own, expected)


def test_blocks_that_are_called_again_after_others_have_all_calls_counted():
    model, batches = llama(), texts()
    twice = [Run(lambda own=one: (model(**own), model(**own)), source=one.source) for one in batches]
    once, again = Made(model, batches).cache, Made(model, twice).cache
    assert again.errors == pytest.approx(once.errors, rel=1e-5)
    for own, other in ((library.weights(name, kept) for library in (once, again)) for name, kept in once.errors):
        for name, value in own.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_damage_is_that_of_a_model_cut_and_refitted_in_one_place():
    model, batches = llama(), texts()
    made, held_out = Made(model, batches), [{"input_ids": tokens(4, 20)}]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    divergence = Divergence(model, runs_of(model, held_out))
    for kind in ("channel", "head"):
        layer = made.layer(kind)
        found = config_losses(made.cache, divergence, layer)
        for kept in probes(layer.levels):
            smaller = llama()
            smaller.load_state_dict(before)
            new = made.cache.weights(layer.name, kept)
            bh.apply(smaller, bh.pruning.plan_units(smaller, made.removed(layer, kept), kind), weights=new)
            with torch.no_grad():
                p, q = (one(held_out[0]["input_ids"]).logits.log_softmax(-1) for one in (model, smaller))
            direct = float((p.exp() * (p - q)).sum(-1).mean())
            assert found[layer.levels.index(kept)] == pytest.approx(direct, rel=3e-2, abs=1e-5)
        assert found[0] == 0
        assert found == sorted(found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_that_are_not_finite_are_refused():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"input features of .*layers\.1\.mlp\.down_proj are NaN or infinite"):
        Made(model, texts())


def test_a_library_on_disk_goes_on_where_it_was(tmp_path, monkeypatch):
    model, batches = llama(), texts()
    memory, first = Made(model, batches), Made(model, batches, folder=tmp_path)
    layer = first.layer("channel")
    divergence = Divergence(model, runs_of(model, [{"input_ids": tokens()}]))
    found = config_losses(first.cache, divergence, layer)
    next(file for file in tmp_path.glob("*.safetensors") if layer.name not in file.name).unlink()
    calls = []
    monkeypatch.setattr(module, "ConsumerRefit", lambda *given, make=module.ConsumerRefit: calls.append(given[1]) or make(*given))
    again = Made(model, batches, folder=tmp_path)
    assert len(calls) == 1
    assert again.cache.errors == first.cache.errors == memory.cache.errors
    for (name, kept), _ in memory.cache.errors.items():
        own, other = memory.cache.weights(name, kept), again.cache.weights(name, kept)
        assert own.keys() == other.keys()
        assert all(torch.equal(value, other[parameter]) for parameter, value in own.items())
    monkeypatch.setattr(divergence, "mean", None)
    assert config_losses(again.cache, divergence, layer) == found


@pytest.mark.parametrize("damage", ["cut off", "empty", "no errors in it", "half a measured.json"])
def test_what_is_damaged_in_a_library_is_made_again(tmp_path, monkeypatch, damage):
    model, batches = llama(), texts()
    first = Made(model, batches, folder=tmp_path)
    layer = first.layer("channel")
    found = config_losses(first.cache, Divergence(model, runs_of(model, batches)), layer)
    errors, file = dict(first.cache.errors), min(tmp_path.glob("*.safetensors"))
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no errors in it":
        save_file({"a/b": torch.zeros(1)}, file)
    else:
        file = tmp_path / "measured.json"
        file.write_text('[["a"')
    with pytest.warns(
        UserWarning, match=f"variant_cache: cannot read {re.escape(file.name)} in '{tmp_path}'. What they held is recomputed"
    ):
        again = Made(model, batches, folder=tmp_path)
    assert again.cache.errors == errors
    assert again.cache.measured == ({} if file.suffix == ".json" else first.cache.measured)
    assert config_losses(again.cache, Divergence(model, runs_of(model, batches)), layer) == found
    assert VariantCache(model, tmp_path, {}).errors.keys() >= errors.keys()
    assert not list(tmp_path.glob("unfinished*"))


def test_another_model_batch_or_setting_has_another_library():
    model, batches, scores = llama(), texts(), {"a": torch.zeros(2)}
    keys = [
        cache_key(model, "s", scores, batches),
        cache_key(model, "s", scores, texts()),
        cache_key(model, "t", scores, batches),
    ]
    keys += [cache_key(model, "s", scores, batches[:3]), cache_key(model, "s", {"a": torch.ones(2)}, batches)]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    keys.append(cache_key(model, "s", scores, batches))
    model.config.hidden_act = "relu"
    keys.append(cache_key(model, "s", scores, batches))
    keys.append(cache_key(model, "s", scores, [{"decoder_input_ids": batch["input_ids"]} for batch in batches]))
    keys.append(cache_key(model, "s", scores, [{"input_ids": batch["input_ids"].view(1, -1)} for batch in batches]))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 8


def test_batches_are_enough_where_a_linear_gets_as_many_tokens_as_it_reads_at_the_highest_level_that_cuts():
    search = RatioSearch(llama(), Amount(params=0.5))
    layers = find_modules(search, "params")
    padded = {"input_ids": tokens(2, 5), "attention_mask": torch.arange(5).expand(2, 5).lt(2).long()}
    check_token_count(search, layers, [{"input_ids": tokens(1, 24)}])  # three of four KV heads, each with two query heads
    check_token_count(search, layers, [padded, {"input_ids": tokens(2, 10)}])
    channels = [layer for layer in layers if layer.kind == "channel"]
    for own, batches, given in (
        (layers, tokens(1, 23), "o_proj needs at least 24 non-padding tokens, got 23"),
        (layers, padded, "got 4"),
    ):
        batch = batches if isinstance(batches, dict) else {"input_ids": batches}
        with pytest.raises(ValueError, match=f"batches: repair of .*{given}"):
            check_token_count(search, own, [batch])
    with pytest.raises(ValueError, match="repair of .*0.mlp.down_proj needs at least 42 non-padding tokens, got 41"):
        check_token_count(search, channels, [{"input_ids": tokens(1, 41)}])
    assert not any(module._forward_pre_hooks for module in search.model.modules())
