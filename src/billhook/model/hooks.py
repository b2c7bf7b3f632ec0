"""Forward hooks in a shadow: those that are part of a model stay, instead of all others something stands that calls nobody."""

import dis
import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

PARTS = ("torch.nn.utils.", "transformers.")  # masks and norms of weights; how transformers collects hidden states


class StandIn:
    """Stands where a hook was, which may do anything to anybody and so is not called."""

    def __init__(self, hook: Callable[..., Any], module: nn.Module, before: bool) -> None:
        self.harmless, self.before = gives_nothing(hook), before
        self.note: Callable[[object], None] | None = None  # is called with what the hook could have replaced
        name, moment = _function(hook).__qualname__, "before" if before else "after"
        what = f"the hook {name} {moment} the forward of {type(module).__name__} is not called"
        does = "it returns nothing, so it should change nothing" if self.harmless else "what it returns would count; remove it"
        self.says = f"{what}: {does}"

    def __call__(self, module: nn.Module, *given: Any) -> None:  # noqa: ANN401 - what hooks get
        """Notes what the hook could have replaced."""
        if self.note is not None and not self.harmless:
            self.note(given if self.before else given[-1])


def stand_ins(model: nn.Module) -> dict[int, Any]:
    """Returns for the id of every dictionary of hooks in a model the one that its shadow gets."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for kind, hooks in vars(module).items():
            if kind.endswith("_hooks") and isinstance(hooks, dict):
                found[id(hooks)] = type(hooks)()
        for kind, before in (("_forward_pre_hooks", True), ("_forward_hooks", False)):
            own: dict[int, Callable[..., Any]] = vars(module).get(kind, {})
            counting = {key: hook for key, hook in own.items() if not getattr(hook, "keeps_shapes", False)}
            new = {key: hook if is_part(hook) else StandIn(hook, module, before) for key, hook in counting.items()}
            found[id(own)] = OrderedDict(new)
    return found


def placed(shadow: nn.Module) -> list[StandIn]:
    """Returns the stand-ins in a shadow."""
    every = [hook for m in shadow.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [hook for hook in every if isinstance(hook, StandIn)]


def gives_nothing(hook: Callable[..., Any]) -> bool:
    """Tells whether a hook returns None, as far as its code shows, so that a module's input or output stays what it is."""
    code = getattr(_function(hook), "__code__", None)
    if code is None:
        return False
    steps = list(dis.get_instructions(code))
    given = [one.argval if one.opname == "RETURN_CONST" else before for before, one in zip(steps, steps[1:], strict=False)
             if one.opname in ("RETURN_CONST", "RETURN_VALUE")]  # fmt: skip
    return all(what is None or (what.opname == "LOAD_CONST" and what.argval is None) for what in given)


def is_part(hook: Callable[..., Any]) -> bool:
    """Tells whether a hook belongs to the model: torch or transformers have put it there."""
    return name_of(hook).startswith(PARTS)


def name_of(hook: Callable[..., Any]) -> str:
    """Returns the module and name of the code at work in a hook."""
    function = _function(hook)
    return f"{function.__module__}.{function.__qualname__}"


def _function(hook: Callable[..., Any]) -> Any:  # noqa: ANN401 - a function, or a class that is called
    """Returns the code at work in a hook: behind what is filled in, decorated or bound."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = inspect.unwrap(hook)
    if inspect.isroutine(hook):
        return getattr(hook, "__func__", hook)
    return type(hook).__call__
