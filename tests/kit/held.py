"""How many bytes of memory tensors hold at most, those that lose their memory and get it again included."""

import gc
import time
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

LEAST = 2**12
"""Bytes of what counts."""


class Held(TorchDispatchMode):
    """Sums the memory of all tensors that operations give within; `most` is how many bytes of it there were at once."""

    def __init__(self, tensors=(), but=None):
        """Counts these too; not what is mapped from a file, or from those of a folder."""
        super().__init__()
        gc.collect()
        gc.freeze()  # what is there by now: so that collecting at each new peak is cheap
        self.most, self._known, self._but = 0, {}, but
        for one in tensors:
            self._look(one)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        found = [self._look(one) for one in (given if isinstance(given, tuple | list) else (given,))]
        if any(found) and self.now() > self.most:
            gc.collect()  # circles of objects hold tensors until the collector comes, which it does when it likes
            self._wait_for_gloo()
            self.most = max(self.most, self.now())
        return given

    def _wait_for_gloo(self):
        """Lets gloo's threads release what they have gathered, which they do at some time after a collective's end."""
        for _ in range(10 * torch.distributed.is_initialized()):
            if self.now() <= self.most:
                return
            time.sleep(0.002)

    def now(self):
        return sum(storage.nbytes() for one in list(self._known.values()) if (storage := one()) is not None)

    def _look(self, one):
        """Notes the memory of a tensor; tells whether it counts."""
        own = one.to_local() if isinstance(one, DTensor) else one
        if not isinstance(own, Tensor) or own.is_meta or own.numel() * own.element_size() < LEAST:
            return False
        storage = own.untyped_storage()
        if storage._cdata not in self._known and (self._but is None or not mapped(storage, self._but)):
            self._known[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: self._known.pop(key, None))
        return True


def mapped(storage, path):
    """Tells whether memory is that of a file, as Linux says."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(start <= storage.data_ptr() < end for start, end in ends)
