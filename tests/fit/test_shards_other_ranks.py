"""FSDP2 on the CPU: what two processes have saved four go on with, and the other way round."""

import pytest
import torch

import billhook as bh
from kit.families import llama
from kit.fits import same
from kit.other_ranks import RESUMED, SAVED
from kit.ranks import run_script

pytestmark = [pytest.mark.nightly, pytest.mark.slow]
SCRIPT = "from kit.other_ranks import fit_all\nfit_all()\n"
CASES = pytest.mark.parametrize(("ranks", "what", "step"), RESUMED)


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_script(folder, SCRIPT, [files, str(folder)])

    def read(name):
        return torch.load(folder / f"{name}.pt", weights_only=True)

    read.folder = folder
    return read


@CASES
def test_another_number_of_ranks_begins_with_equal_weights_and_moments(fitted, ranks, what, step):
    (straight, _, _), (resumed, _, _) = fitted(f"{ranks} {what}"), fitted(f"{ranks} {what}, {step}")
    assert min(resumed) == step
    assert any("exp_avg_sq" in name for name in straight[step])
    assert same(straight[step], resumed[step])


@CASES
def test_another_number_of_ranks_ends_where_the_straight_run_does(fitted, ranks, what, step):
    straight, masks, events = fitted(f"{ranks} {what}")
    resumed, masks_of_other, events_of_other = fitted(f"{ranks} {what}, {step}")
    assert [event["what"] for event in events] == [event["what"] for event in events_of_other]
    assert events[-1]["before"]["params"] > events[-1]["after"]["params"]
    assert straight[5].keys() == resumed[5].keys()
    for name, value in straight[5].items():
        torch.testing.assert_close(resumed[5][name], value, atol=1e-4, rtol=1e-3)
    assert same(masks, masks_of_other)
    for name, mask in masks_of_other.items():
        assert not resumed[5][f"model.{name}.weight"][~mask].any()


@CASES
def test_it_is_loaded_without_ranks(fitted, ranks, what, step):
    (straight, _, _), path = fitted(f"{ranks} {what}"), fitted.folder / f"{ranks} {what}" / f"step={step}.ckpt"
    assert path.is_file() == SAVED[ranks, what]
    lit = bh.training.load_from_checkpoint(bh.TransformerModule, path, model=llama(vocab_size=2048))
    assert all(torch.equal(value, straight[step][name]) for name, value in lit.named_parameters())
