"""Rules of aten operations: how they relate the axes of arguments and results.

A rule is called after the operation as `rule(tape, out, *args, **kwargs)` and records the axes of `out`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from billhook.tracing.rules import contraction, elementwise, indexing, movement

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {**elementwise.RULES, **movement.RULES, **indexing.RULES, **contraction.RULES}


def rule_for(op: OpOverload) -> Rule | None:
    """Returns the rule of an operation, or None.

    Operations without their own rule use the elementwise or reduction rule, by their tag.
    """
    name = op._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_")  # x.abs_() follows the rule of abs(x)
    if (rule := RULES.get(name, RULES.get(plain))) is not None:
        return rule
    functional = getattr(getattr(torch.ops.aten, plain, None), op._overloadname, op)
    if torch.Tag.pointwise in op.tags or torch.Tag.pointwise in functional.tags:
        return elementwise.elementwise
    return elementwise.reduction if torch.Tag.reduction in op.tags else None
