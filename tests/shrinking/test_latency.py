"""A budget of time, by a clock that tests make up: what places cost, what is found, and that it is timed before the cut."""

import math

import pytest
import torch
import transformers

from billhook.engine.batches import Batch
from billhook.pruning.amount import Amount
from billhook.shrinking import latency
from billhook.shrinking.latency import Clock, Workload, with_latency
from billhook.shrinking.planning import ShrinkPlan
from billhook.shrinking.result import Times
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.selection import SearchResult
from kit import shrinks
from kit.families import BERT, T5, llama, tokens

WRITING = "decoding after a prompt of 56 tokens"
FEW, LAYERS = {"generations": 1, "candidates": 2}, 3


def texts():
    torch.manual_seed(0)
    return [Batch({"input_ids": tokens(6, 12)}, name) for name in ("one", "two") * 3]


def model_of():
    torch.manual_seed(1)
    return llama(num_hidden_layers=LAYERS)


def seconds(model, channel, head):
    """What a made-up machine takes."""
    layers = model.model.layers
    channels, heads = (
        sum(one.mlp.down_proj.in_features for one in layers),
        sum(one.self_attn.k_proj.out_features for one in layers),
    )
    return 1e-3 + channel * channels + head * heads / layers[0].self_attn.head_dim


def machine(channel=1e-5, head=1e-5, together=1.0):
    """Times models, in three rounds of which one is disturbed; where both kinds are cut, only a part of what they save counts."""

    def measure(models):
        dense = seconds(models[0], channel, head)
        found = [seconds(one, channel, head) for one in models]
        parts = [
            (seconds(one, channel, 0) < seconds(models[0], channel, 0), seconds(one, 0, head) < seconds(models[0], 0, head))
            for one in models
        ]
        own = [dense - (dense - one) * (together if all(part) else 1) for one, part in zip(found, parts, strict=True)]
        return [(one, one, one * (number + 2)) for number, one in enumerate(own)]

    return measure


@pytest.fixture
def clock(monkeypatch):
    """Puts a made-up machine in the place of the clock."""

    def put(**given):
        measure = machine(**given)
        monkeypatch.setattr(Workload, "seconds", lambda self, models: measure(models))
        return measure

    return put


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_places_cost_what_the_machine_takes():
    model = model_of()
    before, shape = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    found = SearchScope.find(model, Amount(params=0.999), uniform=False)
    priced = with_latency(found, 0.8, Clock(model, machine(channel=3e-5, head=2e-4), "something"), Progress())
    assert (priced.target, priced.now) == ("latency", round(1e9 * seconds(model, 3e-5, 2e-4)))
    assert priced.limit == int(0.8 * priced.now)
    each = {"channel": 30_000, "head": 200_000}
    for layer in priced.modules:
        assert [layer.saves(kept) for kept in (layer.count, *layer.grid()[1:])] == pytest.approx(
            [each[layer.kind] * (layer.count - kept) for kept in layer.grid()], abs=2
        )
    block = 48 * 30_000 + 4 * 200_000
    assert [one.cost for one in priced.blocks.removable] == pytest.approx([block] * (LAYERS - 1), abs=2)
    assert same(model, before)
    assert model.config.to_dict() == shape
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in model.modules())


def test_levels_between_those_that_are_measured_and_times_that_do_not_fall():
    model = model_of()
    found = SearchScope.find(model, Amount(params=0.999), uniform=False)
    steps = {48: 1.0, 42: 1.0, 36: 0.9, 30: 0.95, 24: 0.8, 18: 0.7, 12: 0.6, 6: 0.5}

    def measure(models):
        return [(steps[one.model.layers[0].mlp.down_proj.in_features],) for one in models]

    timed_layers = with_latency(found, 0.8, Clock(model, measure, ""), Progress()).modules
    layer = next(one for one in timed_layers if one.kind == "channel")
    costs = [layer.cost(kept) for kept in range(48, 5, -1)]
    assert costs == sorted(costs, reverse=True)
    share = 1e9 / LAYERS
    expected = {48: 0.5, 45: 0.5, 42: 0.5, 36: 0.425, 30: 0.425, 27: 0.3625, 24: 0.3, 6: 0}
    assert {kept: layer.cost(kept) for kept in expected} == pytest.approx({kept: one * share for kept, one in expected.items()})


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_a_budget_is_used_up_and_the_model_timed_beside_the_dense_one(layers, clock):
    clock(channel=3e-5, head=1e-4)
    dense, model = model_of(), model_of()
    shrunk = shrinks.shrink(model, texts(), latency=0.7, layers=layers, **FEW)
    now, left = (seconds(one, 3e-5, 1e-4) for one in (dense, model))
    assert (shrunk.target, shrunk.limit, shrunk.left) == ("latency", int(0.7 * round(1e9 * now)), round(1e9 * left))
    assert shrunk.left <= shrunk.limit
    assert vars(shrunk.times) == pytest.approx(
        {
            "dense": now,
            "smaller": left,
            "ratio": left / now,
            "workload": WRITING,
            "unused": "",
        }
    )
    assert 0.7 - 3e-5 * (LAYERS if layers == "uniform" else 1) / now - 1e-6 < shrunk.times.ratio <= 0.7
    assert shrunk.to_json()["times"] == vars(shrunk.times)
    assert f"of the dense model's {1e3 * now:.4g} ms (decoding after" in shrunk.text()
    assert any(line.split()[:2] == ["ms", "estimated"] for line in shrunk.text().splitlines())
    assert shrunk.curve[-1].left == round(1e9 * now)


def test_a_block_that_computes_nothing_goes_first(clock):
    clock(channel=3e-5, head=2e-4)
    model = model_of()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    now, block = seconds(model, 3e-5, 2e-4), 48 * 3e-5 + 4 * 2e-4
    shrunk = shrinks.shrink(model, texts(), latency=1 - 0.99 * block / now, layers="free", **FEW)
    assert shrunk.blocks.units == {"model.layers": [2]}
    assert shrunk.left == round(1e9 * (now - block))


@pytest.mark.nightly
def test_what_takes_long_is_what_goes(clock):
    def kept(**given):
        clock(**given)
        shrunk = shrinks.shrink(model_of(), texts(), latency=0.8, layers="free", generations=0)
        counts = [(name, now / before) for name, (before, now) in shrunk.kept.items()]
        return [sum(one for name, one in counts if name.endswith(kind)) / LAYERS for kind in ("mlp", "attn")]

    channels, heads = kept(channel=1e-4, head=1e-6), kept(channel=1e-7, head=1e-3)
    assert channels[0] < 0.9 < channels[1] == 1
    assert heads[1] < 0.9 < heads[0]


@pytest.mark.nightly
@pytest.mark.parametrize("together", [0.8, 1.3])
def test_the_limit_follows_the_clock_where_places_together_take_longer_or_less(together, clock, monkeypatch):
    tried, times = [], Clock.times
    clock(channel=3e-5, head=6e-4, together=together)

    def noted(self, *cut):
        found = times(self, *cut)
        tried.append(found.ratio)
        return found

    monkeypatch.setattr(Clock, "times", noted)
    shrunk = shrinks.shrink(model_of(), texts(), latency=0.6, layers="free", **FEW)
    assert 0.6 - latency.SLACK <= tried[-1] == shrunk.times.ratio <= 0.6
    assert not 0.6 - latency.SLACK <= tried[7 + 3 + 1] <= 0.6  # the first after those of the table and of blocks
    assert shrunk.limit == int(0.6 * round(1e9 * seconds(model_of(), 3e-5, 6e-4)))


class Made:
    """Candidates, a clock and a search in one: what it finds takes less than the knapsack's choice within the same limit."""

    def __init__(self, steps):
        self.now, self.least, self.limit, self.tried = 1000, 100, 700, []
        self.scope, self.steps, self.workload = self, steps, "something"

    def within(self, limit):
        self.tried.append(limit)
        return SearchResult({}, ShrinkPlan(max(step for step in self.steps if step <= limit), None), limit, [], [])

    def times(self, taken, blocks):
        return Times(1.0, taken / 1000, taken / 1000, self.workload)


@pytest.mark.parametrize(
    ("steps", "takes", "unused"),
    [
        (range(1001), (0.68, 0.7), ""),
        ([100, 600, 760], (0.6, 0.6), "0.10 of the budget is unused: the next larger candidate takes 0.760"),
        ([100, 600, 690], (0.69, 0.69), ""),
    ],
    ids=["any", "none between", "one between"],
)
def test_a_search_comes_back_up_until_the_budget_is_used(steps, takes, unused, monkeypatch):
    made = Made(steps)
    monkeypatch.setattr(latency, "knapsack_solution", lambda *_: {})
    monkeypatch.setattr(latency, "plan", lambda _, limit, *__: ShrinkPlan(limit + 100, None))
    found = latency.fast_enough(made, 0.7, made, made.within)
    assert takes[0] <= found.times.ratio <= takes[1]
    assert found.times.unused == unused
    assert made.tried[0] <= 600 < made.tried[1]
    assert str(found.times).endswith(unused or "(something)")
    assert found.limit == 700


@pytest.mark.daily("given0-*")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"channel": 0, "head": 0}, r"latency=0.6 \([\d.]+ ms\) is out of reach. Reachable: [\d.]+ to [\d.]+"),
        ({"together": 0.3}, r"latency=0.6 is out of reach: a model estimated at 0.\d+ of the dense model's time took 0.[789]"),
    ],
)
def test_what_cannot_be_met_changes_nothing(given, says, clock):
    clock(**{"channel": 3e-5, "head": 6e-4} | given)
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        shrinks.shrink(model, texts(), latency=0.6, layers="free", **FEW)
    assert same(model, before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"latency": 1.0}, "latency=1.0 must be a fraction of the dense model's time in"),
        ({"latency": 0.5, "params": 0.5}, "exactly one of .*; got params and latency"),
        (
            {"latency": 0.5, "workload": Workload(context=100)},
            "latency: contexts and new_tokens add up to 108 tokens; .* supports 64",
        ),
        ({"latency": 0.5, "workload": "decode"}, "workload='decode'"),
        ({"params": 0.5, "workload": Workload()}, r"workload=Workload\(.* requires a latency budget"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        shrinks.shrink(model_of(), texts(), **given)


def test_workloads_are_legal_and_decided_for_a_model():
    own = Workload().of(llama())
    assert (own.phase, own.context) == ("decode", 56)
    assert Workload("prefill", 2, 16).of(llama()).phase == "prefill"
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)).eval()
    assert Workload().of(bert).phase == "prefill"
    with pytest.raises(ValueError, match="predict next tokens"):
        Workload("decode").of(bert)
    with pytest.raises(ValueError, match="Only decoders and encoders are supported"):
        Workload().of(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval())
    with pytest.raises(ValueError, match="batch_size=0"):
        Workload(batch_size=0)
    with pytest.raises(ValueError, match="phase='write'"):
        Workload("write")


@pytest.mark.daily("decode")
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_real_clock_gives_figures(phase):
    model = llama()
    found = SearchScope.find(model.train(), Amount(params=0.9), uniform=True)
    own = Workload(phase, context=8, new_tokens=2, rounds=1).of(model.eval())
    priced = with_latency(found, 1 - 1e-9, Clock(model, own.seconds, str(own)), Progress())
    assert priced.now > 0
    assert all(math.isfinite(one) and one >= 0 for layer in priced.modules for _, one in layer.times)
    assert model(tokens()).logits.requires_grad
