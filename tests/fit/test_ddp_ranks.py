"""Two processes with unequal parts of the data, of which one decides otherwise or fails, or that go on where one has ended."""

import json

import pytest
import torch

import billhook as bh
from billhook import KVHeadConversion
from kit.ddp import FitOfTuples, outcome, run_script
from kit.ddp_ranks import (
    DIFFER,
    FAIL,
    FITS,
    RESUMED,
    SCRIPT,
    kept,
    resumed,
)
from kit.fits import trainer


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in RESUMED:
        kept(name, folder / "one").run(folder, files)
    run_script(folder, SCRIPT, [files, str(folder)])
    return folder


@pytest.fixture
def stopped(fitted):
    return json.loads((fitted / "stopped.json").read_text())


def near(state, single, atol=2e-4, rtol=1e-3):
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in single.items()}
    for name, value in single.items():
        torch.testing.assert_close(state[name], value, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", FITS)
def test_two_processes_do_what_one_does(fitted, files, tmp_path, name):
    state, done = outcome(fitted, name)
    _, single, done_by_one = FITS[name].run(tmp_path, files)
    assert done == done_by_one
    near(state, single, *((1e-2, 1e-2) if name == "half precision" else ()))


@pytest.mark.parametrize("what", DIFFER)
def test_ranks_that_decide_otherwise_stop_before_it_is_done(stopped, what):
    for number, (kind, message, events) in enumerate(stopped[what]):
        assert kind == "RanksDiffer"
        assert message.startswith(f"step 1, rank {number} of 2: {what} must be the same on every rank, and on rank 1 it is not")
        assert events == []


@pytest.mark.parametrize("name", FAIL)
def test_where_one_fails_both_stop_and_say_why(stopped, name):
    (kind, message, _), other = stopped[name] if name == "export" else stopped[name][::-1]
    assert kind == {"validation": "ValueError", "export": "OSError"}.get(name, "IndexError")
    assert other[0] == "RanksDiffer"
    failed = f"rank {0 if name == 'export' else 1} ({kind}: {message})"
    assert f"this rank stops, as another has failed: {failed}" in other[1]


def test_ranks_learn_from_one_teacher(stopped):
    for kind, message, _ in stopped["teachers"]:
        assert kind == "ValueError"
        assert message.startswith("distillation: the ranks have teachers with different weights")


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_ended_and_two_where_one_did(fitted, files, tmp_path, name):
    _, expected, done = resumed(name, fitted / "one").run(tmp_path, files)
    two, done_by_two = outcome(fitted, name)
    _, one, done_by_one = resumed(name, fitted / "two").run(tmp_path, files)
    assert repr(done) == repr(done_by_one) == repr(done_by_two)
    near(one, expected)
    near(two, expected)


@pytest.mark.parametrize("name", RESUMED)
def test_one_of_two_processes_exports(fitted, name):
    assert [path.name for path in sorted((fitted / "two").iterdir())] == ["conversion", "conversion.ckpt", "heads", "heads.ckpt"]
    states = [bh.load(fitted / number / name).state_dict() for number in ("one", "two")]
    near(*states)


def test_processes_that_are_forked_give_back_no_shape(tmp_path):
    run = trainer(tmp_path, [KVHeadConversion(2)], devices=2, strategy="ddp_fork")
    with pytest.raises(ValueError, match="KVHeadConversion changes shapes, and processes that are forked or spawned"):
        run.callbacks[0].setup(run, FitOfTuples(), stage="fit")
