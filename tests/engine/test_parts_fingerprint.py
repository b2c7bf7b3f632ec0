"""Values that differ in anything have different fingerprints; equal ones have the same in another process."""

import pytest
import torch

from billhook.engine.batches import Run, runs_fingerprint, runs_of
from billhook.engine.parts import fingerprint

IDS = torch.arange(24)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IDS.view(1, 24), IDS.view(2, 12)),
        (IDS.int(), IDS.int().view(torch.float32)),
        ({"input_ids": IDS}, {"labels": IDS}),
        ([IDS, IDS], [torch.cat([IDS, IDS])]),
        ([[IDS], [IDS]], [[IDS, IDS], []]),
        (("ab", "c"), ("a", "bc")),
        (torch.empty(2, device="meta"), torch.empty(2, device="meta", dtype=torch.bfloat16)),
        (1, True),
    ],
    ids=["shape", "dtype", "name", "joined", "nested", "strings", "dtype on meta", "types"],
)
def test_what_differs_has_another(one, other):
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_the_order_of_a_set_does_not_count():
    assert fingerprint({8, 0}) == fingerprint({0, 8})  # one slot of the set, filled in the order of insertion


def test_runs_of_which_nothing_is_known_are_never_the_same():
    runs = [Run(lambda: None)]
    assert runs_fingerprint(runs) != runs_fingerprint(runs)
    model = torch.nn.Linear(24, 2)
    assert runs_fingerprint(runs_of(model, [IDS])) == runs_fingerprint(runs_of(model, [IDS.clone()]))
