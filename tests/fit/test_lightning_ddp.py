"""Two processes on the CPU, started as a user would: a script under the DDP strategy, which fits one trainer after another.

They have equal or unequal parts of the data; one decides otherwise, or fails; or they go on where one process has ended.
"""

import json
import math
from functools import partial

import pytest
import torch

import billhook as bh
from billhook import KVHeadConversion
from kit.ddp import DIFFER, DRIFTING, FAIL, FITS, RESUMED, SCRIPT, TEACHERS, UNEQUAL, kept, resumed
from kit.fits import trainer
from kit.ranks import FitOfTuples, asked_for, outcome, run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted(request, files, tmp_path_factory):
    """Two processes take seconds to start, so they start once for all."""
    folder, names = tmp_path_factory.mktemp("two"), asked_for(request)
    for name in RESUMED:
        if name in names:
            kept(name, folder / "one").run(folder, files)
    run_script(folder, SCRIPT, [files, str(folder), names])
    return folder


@pytest.fixture
def of_two(fitted):
    return partial(outcome, fitted)


@pytest.mark.parametrize("name", ["convert in stages"])
def test_two_processes_equal_one_on_the_same_global_batches(of_two, files, tmp_path, name):
    state, events = of_two(name)
    _, single, events_of_one = FITS[name].run(tmp_path, files)
    for own, value in state.items():
        torch.testing.assert_close(value, single[own], atol=2e-4, rtol=1e-3, msg=lambda m, own=own: f"{own}: {m}")
    assert [e["step"] for e in events] == [e["step"] for e in events_of_one]
    for two, one_device in zip(events, events_of_one, strict=True):
        for when in ("before", "after"):
            assert two[when] == pytest.approx(one_device[when], rel=2e-3)


@pytest.mark.daily("weights, text")
@pytest.mark.parametrize("name", ["weights, text", "weights, matched"])
def test_two_processes_prune_as_one_does(of_two, files, tmp_path, name):
    state, (masks, events) = of_two(name)
    _, single, (masks_of_one, events_of_one) = FITS[name].run(tmp_path, files)
    sparsities = [[(event["step"], event["after"].get("sparsity")) for event in found] for found in (events, events_of_one)]
    assert sparsities[0] == sparsities[1]
    assert len(masks) == len(masks_of_one) == 14
    for linear, mask in masks.items():
        both = mask & masks_of_one[linear]
        assert (mask == masks_of_one[linear]).float().mean() >= 0.99, linear
        values = [found[f"model.{linear}.weight"] for found in (state, single)]
        assert not values[0][~mask].any()
        torch.testing.assert_close(values[0][both], values[1][both], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["heads in rounds"])
def test_two_processes_prune_the_heads_that_one_does(of_two, files, tmp_path, name):
    state, (record, heads, events) = of_two(name)
    _, single, (record_of_one, heads_of_one, events_of_one) = FITS[name].run(tmp_path, files)
    assert events == events_of_one
    assert heads == heads_of_one
    assert record["numbers"] == record_of_one["numbers"]
    for own, scores in record_of_one["scores"].items():
        torch.testing.assert_close(record["scores"][own], scores, rtol=1e-3, atol=1e-5, equal_nan=True)
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=2e-4, rtol=1e-3)


@pytest.mark.daily("structure", "polish")
@pytest.mark.parametrize("name", ["structure", "experts", "polish", "shrink", "KV heads in stages"])
def test_two_processes_change_shapes_as_one_does(of_two, files, tmp_path, name):
    state, done = of_two(name)
    _, single, done_by_one = FITS[name].run(tmp_path, files)
    assert done == done_by_one
    near(state, single, *((2e-3, 1e-2) if name in ("structure", "experts") else ()))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["degradation"])
def test_two_processes_tell_the_degradation_that_one_does(of_two, files, tmp_path, name):
    _, told = of_two(name)
    _, _, told_by_one = FITS[name].run(tmp_path, files)
    for two, one in zip(told, told_by_one, strict=True):
        assert [own.pop("source") for own in two] == [own.pop("source") for own in one] == ["generated"]
        two, one = ([{name: float(value) for name, value in own.items()} for own in found] for found in (two, one))  # "nan"
        assert two == [pytest.approx(own, rel=2e-3, abs=1e-5, nan_ok=True) for own in one]
        assert math.isnan(two[0].pop("cosine"))  # of models without logits
        assert math.isnan(two[0].pop("cosine_error"))
        assert all(map(math.isfinite, two[0].values()))
        assert two[0]["rows"] == 3


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["written"])
def test_two_processes_write_the_texts_that_one_does(of_two, files, tmp_path, name):
    """Greedily; each samples its share with draws of its own."""
    _, written = of_two(name)
    _, _, written_by_one = FITS[name].run(tmp_path, files)
    for (greedy, sampled), (greedy_of_one, _) in zip(written, written_by_one, strict=True):
        assert greedy["before"] == greedy_of_one["before"]
        assert [texts[when]["texts"] for texts in (greedy, sampled) for when in ("before", "after")] == [3] * 4


@pytest.fixture
def stopped(fitted):
    return json.loads((fitted / "stopped.json").read_text())


def near(state, single, atol=2e-4, rtol=1e-3):
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in single.items()}
    for name, value in single.items():
        torch.testing.assert_close(state[name], value, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.daily("three batches", "half precision")
@pytest.mark.parametrize("name", UNEQUAL)
def test_two_processes_with_unequal_data_do_what_one_does(fitted, files, tmp_path, name):
    state, done = outcome(fitted, name)
    _, single, done_by_one = UNEQUAL[name].run(tmp_path, files)
    assert done == done_by_one
    near(state, single, *((1e-2, 1e-2) if name == "half precision" else ()))


@pytest.mark.daily("drifting, svd")
@pytest.mark.parametrize("name", DRIFTING)
def test_ranks_that_are_rounded_otherwise_end_with_the_first_ones_weights(fitted, name):
    state, done = outcome(fitted, name)
    assert done
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.daily("WeightPruning: *", "StructuredPruning: *", "Shrinking: the batches")
@pytest.mark.parametrize("name", DIFFER)
def test_ranks_that_decide_otherwise_stop_before_it_is_done(stopped, name):
    for number, (kind, message, events) in enumerate(stopped[name]):
        assert kind == "RanksDiffer"
        assert message.startswith(f"step 1, rank {number} of 2: {name} must be identical on all ranks, but rank 1 differs")
        assert events == []


@pytest.mark.daily("structure fails", "export fails")
@pytest.mark.parametrize("name", FAIL)
def test_where_one_fails_both_stop_and_say_why(stopped, name):
    (kind, message, _), other = stopped[name] if name == "export fails" else stopped[name][::-1]
    assert kind == {"validation fails": "ValueError", "export fails": "OSError"}.get(name, "IndexError")
    assert other[0] == "RanksDiffer"
    failed = f"rank {0 if name == 'export fails' else 1} ({kind}: {message})"
    assert f"this rank stops, because another failed: {failed}" in other[1]


@pytest.mark.nightly
@pytest.mark.parametrize("name", TEACHERS)
def test_ranks_learn_from_one_teacher(stopped, name):
    for kind, message, _ in stopped[name]:
        assert kind == "ValueError"
        assert message.startswith("distillation: the teacher's weights differ between ranks")


@pytest.mark.daily("heads go on")
@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_ended_and_two_where_one_did(fitted, files, tmp_path, name):
    _, expected, done = resumed(name, fitted / "one").run(tmp_path, files)
    two, done_by_two = outcome(fitted, name)
    _, one, done_by_one = resumed(name, fitted / "two").run(tmp_path, files)
    assert repr(done) == repr(done_by_one) == repr(done_by_two)
    near(one, expected)
    near(two, expected)


@pytest.mark.daily("heads go on")
@pytest.mark.parametrize("name", RESUMED)
def test_one_of_two_processes_exports(fitted, name):
    assert {path.name for path in (fitted / "two").glob(f"{name}*")} == {name, f"{name}.ckpt"}
    states = [bh.load(fitted / number / name).state_dict() for number in ("one", "two")]
    near(*states)


def test_processes_that_are_forked_give_back_no_shape(tmp_path):
    run = trainer(tmp_path, [KVHeadConversion(2)], devices=2, strategy="ddp_fork")
    match = (
        "KVHeadConversion does not support ddp_notebook, ddp_fork, and ddp_spawn, whose processes return weights without shapes"
    )
    with pytest.raises(ValueError, match=match):
        run.callbacks[0].setup(run, FitOfTuples(), stage="fit")
