"""`bh.prune` and `bh.WeightPruning` with the settings of `bh.PruneOptions` among their other arguments."""

from dataclasses import fields

import billhook as bh

NAMES = {field.name for field in fields(bh.PruneOptions)}


def in_object(arguments):
    """Arguments of which those of `PruneOptions` are in one."""
    rest = {name: value for name, value in arguments.items() if name not in NAMES}
    options = {name: value for name, value in arguments.items() if name in NAMES}
    return rest | ({"options": bh.PruneOptions(**options)} if options else {})


def prune(*args, **arguments):
    return bh.prune(*args, **in_object(arguments))


def WeightPruning(*args, **arguments):  # noqa: N802 - as the class that it makes
    return bh.WeightPruning(*args, **in_object(arguments))
