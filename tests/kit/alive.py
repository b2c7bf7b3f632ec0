"""How many bytes of tensors are alive at most."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from billhook.engine.trees import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the memory of tensors that operations give within; `most` is how many bytes of it there were at once."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        old = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(given):
            if isinstance(one, Tensor) and not one.is_meta and one.untyped_storage()._cdata not in self._known | old:
                self._count(one.untyped_storage())
        return given

    def _count(self, storage):
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, number, size):
        self._known.discard(number)
        self.now -= size
