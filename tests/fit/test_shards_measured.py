"""FSDP2: two processes tell the degradation that one does, and find the smaller model that one does, a block at a time."""

import math

import pytest
import torch

from billhook.engine.comm import MESSAGE
from kit.measured import MODULES, shrunk, told
from kit.ranks import run_script
from kit.sent import BYTES, GATHERS, MEETS, OTHERS, SCATTERS, SENT, SUMS, model

pytestmark = [pytest.mark.nightly, pytest.mark.slow]
SCRIPT = "from kit.measured import fit_all\nfit_all()\n"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [str(folder)])
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_tell_the_sharded_degradation_that_one_does(of_two, tmp_path, name):
    alike, found = torch.load(of_two / f"told, {name}.pt", weights_only=True)
    _, of_one = told(tmp_path, name)
    assert alike
    for here, there in zip(found, of_one, strict=True):
        assert [own.pop("source") for own in here] == [own.pop("source") for own in there] == ["generated"]
        here, there = ([{name: float(value) for name, value in own.items()} for own in found] for found in (here, there))  # "nan"
        assert here == [pytest.approx(own, rel=2e-3, abs=1e-5, nan_ok=True) for own in there]
        assert math.isnan(here[0].pop("cosine"))  # of models without logits
        assert math.isnan(here[0].pop("cosine_error"))
        assert all(map(math.isfinite, here[0].values()))
        assert here[0]["rows"] == 3
        assert here[0]["kl"] > 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_shrink_a_sharded_model_to_what_one_finds(of_two, tmp_path, name):
    alike, (what, left, kept, state) = torch.load(of_two / f"shrunk, {name}.pt", weights_only=True)
    _, (what_of_one, left_of_one, kept_of_one, state_of_one) = shrunk(tmp_path, name)
    assert alike
    assert (what, left, kept) == (what_of_one, left_of_one, kept_of_one)
    assert len(what) == 1
    for own, value in state_of_one.items():
        # a refit, and Adam's first steps, which divide a gradient near zero by itself, make more of what rounding has left
        torch.testing.assert_close(state[own], value, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name", SENT)
def test_ranks_send_what_the_manual_reckons(of_two, name):
    """See docs/evidence/distributed.md."""
    sent = torch.load(of_two / f"{name}, sent.pt", weights_only=True)
    made, meets = model(), sent.get(MEETS, [])
    blocks = sum(4 * own.numel() for own in made.model.layers.parameters())
    around = sum(4 * own.numel() for own in made.parameters()) - blocks
    gathered, summed = sum(sum(sent.get(kind, [])) for kind in GATHERS), sum(sent.get(SUMS, []))
    most, reckoned = SENT[name].gathered(made, around, blocks), SENT[name].summed(made)
    assert 0.55 * most < gathered <= most
    bytewise, scores = sent.get(BYTES, []), 4 * SENT[name].scores
    plain = 2 * sum(size for size in bytewise if size in (MESSAGE, 2 * MESSAGE))  # what ranks know, and what else goes with it
    least = reckoned + scores
    assert least <= summed + sum(bytewise) <= least + plain + 8 * (2 + 1) * len(meets)  # of tokens, and of who needs which block
    assert set(meets) == {2 * 1024}
    assert sent.keys() <= {SUMS, BYTES, MEETS, SCATTERS, *GATHERS, *OTHERS}


def test_a_search_whose_ranks_have_other_settings_stops_before_they_measure_other_models(of_two):
    alike, message = torch.load(of_two / "differing.pt", weights_only=True)
    assert alike
    assert "Shrinking: the settings must be identical on all ranks, but rank 1 differs from rank 0" in message
