import weakref

import pytest

from billhook.kv_heads.moments import MomentSums


@pytest.fixture
def alive_sums(monkeypatch):
    """The number of sums of moments that are alive, as each is made."""
    alive, numbers, begin = weakref.WeakSet(), [], MomentSums.__init__

    def begun(self, *given):
        begin(self, *given)
        alive.add(self)
        numbers.append(len(alive))

    monkeypatch.setattr(MomentSums, "__init__", begun)
    return numbers
