"""The best smaller model within a budget: met, the same again, alike layers or free ones, saved and loaded."""

import copy

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.batches import Batch, runs_of
from billhook.shrinking import shrink
from billhook.shrinking.divergence import Divergence, split_batches
from kit import shrinks
from kit.families import BERT, T5, build, llama, tokens

FEW = {"generations": 1, "candidates": 2}


def texts(rows=6, length=20):
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(rows, length)}, name) for name in ("one", "two") * 3]


def trained():
    """A Llama whose layers do not all matter as much."""
    torch.manual_seed(1)
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(4.0 * number)
            layer.self_attn.o_proj.weight.mul_(8.0 / (number + 1))
    return model


def measure_result(**given):
    model = trained()
    return model, shrinks.shrink(model, texts(), **FEW | given)


@pytest.mark.daily("budget0-uniform", "budget2-free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
@pytest.mark.parametrize("budget", [{"params": 0.8}, {"bytes": 0.75}, {"params": 20_000}])
def test_a_budget_is_used_up_and_not_exceeded(layers, budget):
    before, (model, shrunk) = bh.summary(trained()), measure_result(layers=layers, **budget)
    ((target, asked),) = budget.items()
    now, left = getattr(before, target), getattr(bh.summary(model), target)
    assert shrunk.limit == (asked if isinstance(asked, int) else int(asked * now))
    assert left == shrunk.left <= shrunk.limit
    step = {"params": 3 * 32, "bytes": 4 * 3 * 32}[target] * (4 if layers == "uniform" else 1)
    assert shrunk.limit - left < step
    assert {"head", "channel"} >= set(shrunk.plan.kinds.values())


def test_layers_stay_alike_and_plain_transformers_loads_them(tmp_path):
    model, shrunk = measure_result(params=0.7)
    assert len({counts for name, counts in shrunk.kept.items() if name.endswith("mlp")}) == 1
    assert len({counts for name, counts in shrunk.kept.items() if name.endswith("attn")}) == 1
    bh.save(model, tmp_path / "out")
    again, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.nightly
def test_the_smallest_that_can_be_reached_is():
    _, some = measure_result(params=0.7, layers="free", generations=0)
    least = some.curve[0].left
    _, smallest = measure_result(params=least, layers="free", generations=0)
    assert smallest.left == least
    assert {now for _, now in smallest.kept.values()} == {0, 1, 6}  # of all blocks but the first nothing
    with pytest.raises(ValueError, match=f"params={least - 1} .* is out of reach. Reachable: {least:,} to"):
        measure_result(params=least - 1, layers="free")


def test_evolution_never_ends_worse_and_its_seed_decides():
    _, none = measure_result(params=0.7, layers="free", generations=0)
    steps = []
    several = {"generations": 2, "candidates": 3, "seed": 3}
    model, some = measure_result(params=0.7, layers="free", progress=lambda *done: steps.append(done), **several)
    twin, same = measure_result(params=0.7, layers="free", **several)
    assert some.tried[0].measured <= none.tried[0].measured
    assert len(some.tried) > len(none.tried)
    assert some.to_json() == same.to_json()
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.nightly
def test_what_was_measured_is_told_on_batches_that_were_not_fitted():
    dense, batches = trained(), texts()
    fitted, held_out = split_batches(batches)
    assert [batch.source for batch in held_out] == ["one", "two"]
    assert len(fitted) == 4
    divergence = Divergence(dense, runs_of(dense, held_out))
    shrunk = shrinks.shrink(dense, batches, params=0.8, **FEW)
    assert divergence.by_source() == shrunk.measured
    model = trained()
    weights = bh.repair(model, measure_result(params=0.8)[1].plan, fitted)
    bh.apply(model, shrunk.plan, weights=weights)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert "KL divergence from the dense model, by size" in str(shrunk)
    assert "\nselected model, as saved: KL " in str(shrunk)
    assert "which also selected the model" in str(shrunk)
    sizes = [choice.left for choice in shrunk.curve]
    assert sizes == sorted(sizes)
    assert shrunk.curve[-1].measured == pytest.approx(0, abs=1e-5)


def test_a_kind_that_cannot_be_removed_and_protected_blocks_stay_whole():
    model = build("olmo2", num_hidden_layers=4)
    shrunk = shrinks.shrink(
        model, texts(), params=0.9, first=1, last=1, round_to=8, repair=None, importance=bh.importance.WeightNorm(), **FEW
    )
    assert [name for name, (before, now) in shrunk.kept.items() if now < before] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert not any(now % 8 for _, now in shrunk.kept.values())
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers][::3] == [48, 48]


def test_a_classifier_and_an_encoder_with_a_decoder():
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)).eval()
    rows = [{"input_ids": tokens(8, 16), "labels": torch.zeros(8, dtype=torch.long)} for _ in range(4)]
    assert bert.num_parameters() > shrinks.shrink(bert, rows, params=0.95, **FEW).left == bert.num_parameters()
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    rows = [{"input_ids": tokens(8, 16), "labels": tokens(8, 10)} for _ in range(4)]
    assert shrinks.shrink(t5, rows, params=0.97, **FEW).left == t5.num_parameters()


@pytest.mark.daily("budget0-*")
@pytest.mark.parametrize(
    ("budget", "tokens_each", "says"),
    [
        ({"params": 0.8}, 7, "16 non-padding tokens, got 14"),  # four of eight query heads
        ({"max_loss": 1.1}, 7, "16 non-padding tokens, got 14"),
    ],
)
def test_too_few_tokens_for_any_refit_are_told_or_refused_before_anything_is_measured(budget, tokens_each, says, monkeypatch):
    monkeypatch.setattr(shrink, "measure", None)
    batches = [{"input_ids": tokens(1, tokens_each)}] * 3
    limit_tokens = f"repair of .*o_proj needs at least {says}"
    with pytest.raises(ValueError, match=f"batches: {limit_tokens}"):
        shrinks.shrink(trained(), batches, repair=bh.RepairConfig(), **budget)
    with pytest.warns(UserWarning, match=f"shrink: not repaired: {limit_tokens}"), pytest.raises(TypeError, match="not callable"):
        shrinks.shrink(trained(), batches, **budget)
    with pytest.raises(TypeError, match="not callable"):
        shrinks.shrink(trained(), batches, repair=None, **budget)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "Budget requires exactly one of params, bytes, max_loss; got none"),
        ({"params": 0.5, "bytes": 0.5}, "exactly one of .*; got params and bytes"),
        ({"params": 1.5}, "params=1.5 must be a whole number above 0, or a fraction of the model in"),
        ({"params": 30}, r"params=30 \(30\) is out of reach.*protect fewer blocks; did you mean 0.3\?"),
        ({"params": 0.01}, r"params=0.01 \(\d+\) is out of reach. Reachable: [\d,]+ to [\d,]+"),
        ({"params": 10**9}, "params=1000000000 is met already: the model has 35,104"),
        ({"params": 0.8, "layers": "all"}, "layers='all' must be one of uniform, free"),
        ({"params": 0.8, "generations": -1}, "generations=-1"),
        ({"params": 0.8, "candidates": 0}, "candidates=0"),
        ({"params": 0.8, "variant_cache": __file__}, "test_shrink.py' is a file. Pass a folder."),
        ({"params": 0.8, "batches": texts(1)[:2]}, "batches: at least 3 examples, and 2 of each source.*1 of one, 1 of two"),
        ({"params": 0.8, "batches": []}, "got none"),
        (
            {"params": 0.8, "batches": [{"input_ids": tokens(1, 4)}] * 3, "repair": bh.RepairConfig()},
            r"batches: repair of \S+ needs at least \d+ non-padding tokens",
        ),
    ],
)
def test_what_is_refused_changes_nothing(given, says):
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        shrinks.shrink(model, **{"batches": texts()} | given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_in_the_last_measure_undoes_the_cut():
    model, calls = trained(), []

    def count(*_):
        calls.append(0)
        if len(calls) == last:
            raise MemoryError("in the last measure")

    model.lm_head.register_forward_pre_hook(count)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, last = copy.deepcopy(model.config), 0
    small = {"params": 0.8, "repair": bh.RepairConfig(), "generations": 0, "candidates": 1}
    shrinks.shrink(whole := copy.deepcopy(model), texts(), **small)
    assert whole.num_parameters() < model.num_parameters()
    last, _ = len(calls), calls.clear()
    with pytest.raises(MemoryError, match="in the last measure"):
        shrinks.shrink(model, texts(), **small)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {n: v.tolist() for n, v in before.items()}
    assert model.config.to_dict() == config.to_dict()
