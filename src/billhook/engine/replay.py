"""Runs a model again from the first block that has changed: the blocks before it give what they gave."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.engine.state import overridden
from billhook.engine.trees import tree_leaves, tree_map_only

BYTES = 2**31
"""How much is held of all runs together; beyond that, nothing is, and models run as a whole."""


class Replay:
    """Holds what the blocks of a model gave in its runs.

    Args:
        blocks: The blocks, by name.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks, self._size = dict(blocks), 0
        self._given = list[dict[str, Any]]()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what the blocks give in the next run, which is done within the `with` block."""
        given, again = dict[str, Any](), list[str]()

        def note(name: str, _: nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401
            again.extend([name] if name in given else [])
            self._size += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            given[name] = None if self._size > BYTES else _copied(output)

        with ExitStack() as hooks:
            for name, block in self._blocks.items():
                hooks.callback(block.register_forward_hook(partial(note, name)).remove)
            yield
        self._given.append({} if again else given)
        if self._size > BYTES:
            self.forget()

    @contextmanager
    def before(self, changed: Collection[str], run: int) -> Iterator[None]:
        """Lets the blocks before the first of some modules give what they gave, for as long as the `with` block lasts.

        Args:
            changed: Names of modules that have changed; where one is in no block, the model runs as a whole.
            run: The number of the run.
        """
        given = self._given[run] if self._given else {}
        places = [number for number, block in enumerate(given) for name in changed if f"{name}.".startswith(f"{block}.")]
        known = list(given)[: min(places)] if places and len(places) == len(changed) else []
        with ExitStack() as stack:
            for name in known:
                stack.enter_context(overridden(self._blocks[name], forward=partial(_again, given[name])))
            yield

    def forget(self) -> None:
        """Lets models run as a whole from now on."""
        self._given = []


def _again(output: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - whatever a block is given and returns
    return _copied(output)


def _copied(output: Any) -> Any:  # noqa: ANN401
    """Copies what a block gives, as the next one may add to it in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)
