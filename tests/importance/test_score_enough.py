"""Units are scored on as many batches as are enough, each of them once."""

import copy
from collections import Counter
from itertools import count

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Batch
from billhook.importance import score as scored
from billhook.importance.score import Scoring, score_enough
from kit.families import llama, tokens
from kit.ranks import Ranks

CHANNELS = {
    "taylor": bh.Taylor(),
    "mixed": bh.Taylor("mixed"),
    "gates": bh.GateGradient(),
    "activations": bh.ActivationNorm(),
    "outputs": bh.OutputNorm(),
    "obs": bh.OBS(),
    "obs in passes": bh.OBS(passes=2),
}


def batches(number=13):
    torch.manual_seed(1)
    return [Batch({"input_ids": tokens(1, 24 + place % 3)}, "ab"[place % 2]) for place in range(number)]


def lowest(scores, share=0.5):
    return {name: own.argsort()[: int(share * len(own))].tolist() for name, own in scores.items()}


def never_alike():
    numbers = count()
    return lambda _: {"place": [next(numbers)]}


@pytest.mark.parametrize("name", CHANNELS)
def test_scores_are_those_of_the_whole_and_each_batch_is_run_once(name, monkeypatch):
    model, importance, runs = llama(), CHANNELS[name], Counter()
    units, made = bh.find_units(model, "channel"), scored.run_of

    def run_of(model, units, batch, loss=None):
        runs[id(batch)] += 1
        return made(model, units, batch, loss)

    monkeypatch.setattr(scored, "run_of", run_of)
    given = batches()
    scores, settled = score_enough(Scoring(model, units, importance), given, lowest, 1.0)
    assert settled.batches == settled.of == 13
    assert len(runs) == 13
    assert (set(runs.values()) == {1}) == importance.adds_up
    whole = bh.score(model, units, importance, given)
    exact = not isinstance(importance, bh.OBS)  # whose moments are float32
    for place, own in scores.items():
        torch.testing.assert_close(own, whole[place], rtol=1e-6 if exact else 1e-4, atol=0)


def test_blocks_too():
    model = llama()
    units, given = bh.find_units(model, "block"), batches()
    for importance in (bh.BlockInfluence(), bh.Ablation()):
        scores, settled = score_enough(Scoring(model, units, importance), given, never_alike(), 1.0)
        assert (settled.halves, settled.doubling) == (0, 0)
        whole = bh.score(model, units, importance, given)
        assert all(torch.allclose(own, whole[place], rtol=1e-6, atol=0) for place, own in scores.items())


def test_an_importance_without_data_settles_nothing():
    model = llama()
    units = bh.find_units(model, "channel")
    scores, settled = score_enough(Scoring(model, units, bh.WeightNorm()), (), lowest, 0.99)
    assert settled is None
    assert torch.equal(next(iter(scores.values())), next(iter(bh.score(model, units, bh.WeightNorm()).values())))


def test_one_batch_cannot_be_compared():
    model = llama()
    scoring = Scoring(model, bh.find_units(model, "channel"), bh.OutputNorm())
    _, settled = score_enough(scoring, batches(1), lowest, 0.5)
    assert (settled.batches, settled.halves, settled.is_enough) == (1, None, False)
    with pytest.raises(ValueError, match="OutputNorm needs at least one batch"):
        score_enough(scoring, [], lowest, 0.5)


def test_two_ranks_take_the_same_steps():
    """Each has every other batch, one of them one more; sums over ranks decide, as if one had them all."""
    given, model = batches(17), llama()
    units = bh.find_units(model, "channel")

    copies = [copy.deepcopy(model) for _ in range(2)]

    def on(rank, comm):
        return score_enough(Scoring(copies[rank], units, bh.OutputNorm(), comm=comm), given[rank::2], never_alike(), 1.0)

    (scores, settled), (others, other) = Ranks(2).run(on)
    assert settled == other
    assert (settled.batches, settled.of) == (17, 17)
    whole = bh.score(model, units, bh.OutputNorm(), given)
    for place, own in scores.items():
        assert torch.equal(own, others[place])
        torch.testing.assert_close(own, whole[place], rtol=1e-6, atol=0)
