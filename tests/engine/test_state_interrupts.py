"""An interrupt from the keyboard that strikes while a model is put back as it was is raised when that has been done."""

import inspect
import signal
import sys
import threading

import pytest
import torch

import billhook as bh
from billhook.engine.state import uninterrupted
from billhook.model import surgery
from kit.families import llama
from kit.unharmed import differing, everything

BATCHES = [{"input_ids": torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(n))} for n in range(3)]


class Strike:
    """Presses Ctrl-C at one of the lines of some functions of a file, those before a given one left out."""

    def __init__(self, module, names, at, after=""):
        self.file, self.names, self.at, self.lines = module.__file__, names, at, 0
        source = inspect.getsource(module).splitlines()
        self.first = next((n for n, line in enumerate(source, 1) if line.strip() == after), 0)

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename != self.file or frame.f_code.co_name not in self.names:
            return None
        if event == "line" and frame.f_lineno > self.first:
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.fixture
def keyboard():
    """Python's own handler, which pytest may have replaced."""
    before, trace = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    yield
    sys.settrace(trace)  # that of a measure of coverage
    signal.signal(signal.SIGINT, before)


def struck(strike, run):
    before = sys.gettrace()
    sys.settrace(strike)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        sys.settrace(before)
    assert strike.lines >= strike.at


@pytest.mark.parametrize("at", [5, 20, 45, 60])
def test_a_plan_of_blocks_leaves_the_model_as_it_was(at, keyboard):
    model = llama(num_hidden_layers=3)
    bh.plan(model, bh.importance.BlockInfluence(), BATCHES, blocks=1)  # what is remembered of a trace is there by then
    before = everything(model)
    struck(Strike(surgery, ("back", "_refill"), at), lambda: bh.plan(model, bh.importance.BlockInfluence(), BATCHES, blocks=1))
    assert differing(before, everything(model)) == []
    model(**BATCHES[0])


def test_one_within_another_and_in_another_thread(keyboard):
    done = []

    def half():
        with uninterrupted():
            done.append(1)

    def nested():
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append(2)
            done.append(3)

    with pytest.raises(KeyboardInterrupt):
        nested()
    other = threading.Thread(target=half)
    other.start()
    other.join()
    assert done == [2, 3, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
