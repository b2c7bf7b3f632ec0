"""Two processes on the CPU, started as a user would: a script under the DDP strategy, which fits one trainer after another."""

from functools import partial

import pytest
import torch

from kit.ddp import (
    FITS,
    outcome,
    run_script,
)

# two processes take seconds to start, so they start once for all; as any user's, they do not order sets of strings alike
SCRIPT = """
import os
os.environ["PYTHONHASHSEED"] = "4"  # the second's; the first has 3
from kit.ddp import fit_all
fit_all()
"""


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [files, str(folder)])
    return folder


@pytest.fixture
def of_two(fitted):
    return partial(outcome, fitted)


@pytest.mark.parametrize("name", ["convert at the start", "convert in stages"])
def test_two_processes_equal_one_on_the_same_global_batches(of_two, files, tmp_path, name):
    state, events = of_two(name)
    _, single, events_of_one = FITS[name].run(tmp_path, files)
    for own, value in state.items():
        torch.testing.assert_close(value, single[own], atol=2e-4, rtol=1e-3, msg=lambda m, own=own: f"{own}: {m}")
    assert [e["step"] for e in events] == [e["step"] for e in events_of_one]
    for two, one_device in zip(events, events_of_one, strict=True):
        for when in ("before", "after"):
            assert two[when] == pytest.approx(one_device[when], rel=2e-3)


@pytest.mark.parametrize("kind", ["tuples", "text"])
def test_two_processes_prune_as_one_does(of_two, files, tmp_path, kind):
    state, (masks, events) = of_two(f"weights, {kind}")
    _, single, (masks_of_one, events_of_one) = FITS[f"weights, {kind}"].run(tmp_path, files)
    assert [(e["step"], e["after"]["sparsity"]) for e in events] == [(e["step"], e["after"]["sparsity"]) for e in events_of_one]
    assert len(masks) == len(masks_of_one) == 14
    for name, mask in masks_of_one.items():
        assert (mask == masks[name]).float().mean() >= 0.99, name
    prefix = "net." if kind == "tuples" else "model."
    for name, mask in masks.items():
        both = mask & masks_of_one[name]
        values = [found[f"{prefix}{name}.weight"] for found in (state, single)]
        assert not values[0][~mask].any()
        torch.testing.assert_close(values[0][both], values[1][both], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["heads in rounds", "heads at the end"])
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


def test_two_processes_cut_and_repair_what_one_does(of_two, files, tmp_path):
    state, events = of_two("structure")
    _, single, events_of_one = FITS["structure"].run(tmp_path, files)
    assert events == events_of_one
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in single.items()}
    for name, value in single.items():
        torch.testing.assert_close(state[name], value, atol=2e-3, rtol=1e-2)


def test_two_processes_remove_the_blocks_that_one_does(of_two, files, tmp_path):
    state, blocks = of_two("depth")
    _, single, blocks_of_one = FITS["depth"].run(tmp_path, files)
    assert blocks == blocks_of_one
    for name, value in single.items():
        torch.testing.assert_close(state[name], value, atol=2e-4, rtol=1e-3)
