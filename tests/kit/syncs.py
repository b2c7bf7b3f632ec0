"""How often the host waits for a device: counted on a CPU, where the same operations run."""

import inspect
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import billhook

SOURCE = str(Path(billhook.__file__).parent)

aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense,  # item, bool(tensor), allclose
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._linalg_check_errors,
}
"""Operations whose result the host has to know before it goes on."""

INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}


class Syncs(TorchDispatchMode):
    """Counts host syncs within, by the line of billhook that asks for each (`places`), or the test's where none does.

    A read scalar, `nonzero`, `equal`, an index by bool and the like are syncs; so are `tensor.cpu()`, `tensor.to("cpu")` and
    `tensor.tolist()`, which on a CPU copy nothing. With `uploads`, so is a tensor that is made of numbers of Python or NumPy,
    as `torch.tensor(numbers, device="cuda")` waits too. Not every such tensor goes to a device, but a step should make none.

    >>> with Syncs() as syncs:
    ...     _ = torch.ones(3).sum().item()
    >>> syncs.total
    1
    """

    def __init__(self, uploads=False):
        super().__init__()
        self.copied = 0  # bytes that come to the host
        self.places, self.uploads, self._calls, self._from_numpy = Counter(), uploads, _Calls(self), torch.from_numpy

    @property
    def total(self):
        return self.places.total()

    def note(self):
        self.places[_place()] += 1

    def __enter__(self):
        if self.uploads:
            torch.from_numpy = self._made
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)
        torch.from_numpy = self._from_numpy

    def _made(self, array):
        self.note()
        return self._from_numpy(array)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation.overloadpacket
        if packet in WAITS or (packet in INDEXED and _by_bool(packet, args)):
            self.note()
        return operation(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Sees the calls of Python that bring a tensor to the host."""

    def __init__(self, syncs):
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copied = function is Tensor.cpu or (function is Tensor.tolist and args[0].dim())
        if function is Tensor.to:
            copied = "cpu" in [one for one in (*args[1:], *kwargs.values()) if isinstance(one, str)]
        if copied and not args[0].is_meta:
            self._syncs.note()
            self._syncs.copied += args[0].nbytes
        if self._syncs.uploads and function in (torch.tensor, torch.as_tensor):
            self._syncs.note()
        return function(*args, **kwargs)


def _by_bool(packet, args):
    """Tells whether an index is of bools; with one number for all, it is a fill, which needs no sync."""
    filled = packet is not aten.index and args[2].numel() == 1
    return not filled and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _place():
    """The nearest line of billhook's code."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_filename.startswith(SOURCE):
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}"


class _Steps(pl.Callback):
    """Tells apart what is counted in each step; it has to be the first callback."""

    def __init__(self, syncs):
        self.syncs, self.seen = syncs, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(self.syncs.places.copy())


@contextmanager
def steps_counted(run):
    """Counts the syncs of a fit; gives a list of `Counter`s, one for each step but the last."""
    syncs, counted = Syncs(uploads=True), []
    steps = _Steps(syncs)
    run.callbacks.insert(0, steps)
    with syncs:
        yield counted
    run.callbacks.remove(steps)
    counted += [after - before for before, after in zip(steps.seen, steps.seen[1:], strict=False)]
