"""Two nodes that meet by torchrun: one is killed in an event, and the run goes on from its last checkpoint."""

import signal

import pytest
import torch

from kit.fits import trainer
from kit.nodes import STEPS, callback, run_nodes
from kit.sharding import Own

pytestmark = [pytest.mark.nightly, pytest.mark.slow]


def test_a_node_is_killed_in_an_event_and_the_run_ends_as_if_it_was_not(tmp_path):
    (first, said), (second, _) = run_nodes(tmp_path, dies=True)
    assert second == -signal.SIGKILL
    assert first > 0, said
    assert not (tmp_path / "end.pt").exists()
    last = tmp_path / "step=4.ckpt"
    assert (last / "meta.pt").is_file()  # of the step before the event
    for code, told in run_nodes(tmp_path, path=last):
        assert code == 0, told[-3000:]
    state, events = torch.load(tmp_path / "end.pt", weights_only=True)
    torch.manual_seed(0)
    own, alone = callback(), Own(batch=4)
    trainer(tmp_path / "one", [own], STEPS).fit(alone)
    assert [event["what"] for event in events] == [event["what"] for event in own.events]
    assert len(events) == 2
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-3)
