"""Tensors that stay in files: each is read whenever something computes with it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from billhook.running.sharded.torch_internals import as_plain, tensor_of
from billhook.running.trees import tree_map_only


class Unread(Tensor):
    """A tensor of known size that takes no memory: whatever computes with it, or copies it, is given what `read` returns.

    What comes out is a plain tensor, so that `load_state_dict` holds one of these in memory at a time, beside the module.
    """

    read: Callable[[], Tensor]

    @staticmethod
    def of(size: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor], device: torch.device | None = None) -> "Unread":
        """Makes one that counts as on a device, by default the CPU, where it is put as soon as it has been read."""
        own: Unread = tensor_of(Unread, size, dtype, device or torch.device("cpu"))
        own.read = read
        return own

    def on(self, device: torch.device) -> "Unread":
        """Returns the same, for another device."""
        return Unread.of(self.shape, self.dtype, self.read, device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with as_plain():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Computes with what is read."""
        plain, named = tree_map_only(Unread, lambda one: one.read().to(one.device), (args, kwargs or {}))
        return func(*plain, **named)
