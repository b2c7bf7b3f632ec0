"""How often billhook's functions are called."""

import sys
from collections import Counter

from kit.syncs import SOURCE


class Calls:
    """Counts calls of billhook's functions within, by name, in this thread.

    >>> import billhook as bh
    >>> with Calls() as calls:
    ...     _ = bh.trace(bh.load("tiny").config)
    >>> calls.counts["trace"]
    1
    """

    def __init__(self):
        self.counts = Counter()

    def __enter__(self):
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            self.counts[frame.f_code.co_name] += 1
