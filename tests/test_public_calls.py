"""Public calls give on a device, under a default device, and with half-precision attention what they give on the CPU."""

import pytest

from kit.public_calls import CALLS, PLACES
from kit.ranks import asked_for
from kit.standin import said_by

DAILY = [
    *("on the default device-" + name for name in ("prune Magnitude", "prune SparseGPT", "plan channels", "save")),
    "half kernel-prune match",
    "half kernel-repair match",
]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What is wrong with a call at a place: all calls of a place in one process, as a device cannot be taken away again."""
    said = {}

    def at(place):
        if place not in said:
            said[place] = said_by("kit.public_calls", place, tmp_path_factory.mktemp("files"), *asked_for(request, place=place))
        return said[place]

    return at


@pytest.mark.daily(*DAILY)
@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", PLACES)
def test_a_call_gives_what_it_gives_on_the_cpu(place, name, found):
    wrong, ended = found(place)
    assert name in wrong, ended
    assert wrong[name] == "", wrong[name]
