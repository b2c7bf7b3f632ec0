"""Two ranks on the CPU, of which one fails while the other gathers shards, or works alone for longer than a collective waits."""

import json

import pytest

import billhook as bh
from kit.alone import FAILING, SCRIPT
from kit.ranks import run_script

pytestmark = [pytest.mark.nightly, pytest.mark.slow]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_script(folder, SCRIPT, str(folder))
    return folder, json.loads((folder / "ended.json").read_text())


@pytest.mark.parametrize("name", FAILING)
def test_where_a_rank_fails_while_others_gather_each_log_says_why(ended, name):
    number = FAILING[name][-1]
    (code, own), (other, said) = ended[1][name][number], ended[1][name][1 - number]
    assert (code, other) == (1, 1), own + said
    assert own.endswith("\nRuntimeError: this rank has no memory left\n")
    why = "rank 1 (RuntimeError: this rank has no memory left)"
    if number == 0:
        why = "the process with the store has ended (rank 0, or torchrun on its machine). See its log"
    assert said.endswith(f"RanksDiffer: step 1, rank {1 - number} of 2: this rank stops, because another failed: {why}\n")


def test_ranks_wait_for_what_one_does_alone_as_long_as_it_takes(ended):
    folder, of = ended
    for number, (code, said) in enumerate(of["export"]):
        assert code == 0, said
        assert said.endswith(f"rank {number} has gone on\n")
    assert bh.load(folder / "export" / "model")
