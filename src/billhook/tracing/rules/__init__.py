"""The rules of aten ops: how each relates the axes of its arguments and results.

A rule is called after the op as `rule(tape, out, *args, **kwargs)` and notes the axes of `out`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from billhook.tracing.rules import contraction, elementwise, indexing, movement

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **movement.RULES,
    **indexing.RULES,
    **contraction.RULES,
}


def rule_for(op: OpOverload) -> Rule | None:
    """Returns the rule of an op: its own, or by its tag that of elementwise ops or of reductions; None if there is none."""
    name = op._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_")  # x.abs_() does what abs(x) does
    if (rule := RULES.get(name, RULES.get(plain))) is not None:
        return rule
    functional = getattr(getattr(torch.ops.aten, plain, None), op._overloadname, op)
    if torch.Tag.pointwise in op.tags or torch.Tag.pointwise in functional.tags:
        return elementwise.elementwise
    return elementwise.reduction if torch.Tag.reduction in op.tags else None
