"""`bh.shrink` and `bh.Shrinking` with the settings of budget and search among their other arguments."""

from dataclasses import fields

import billhook as bh


def in_objects(options):
    """Arguments of which those of a budget and of a search are in their objects."""
    budget, search = ({field.name for field in fields(kind)} & options.keys() for kind in (bh.Budget, bh.Search))
    rest = {name: value for name, value in options.items() if name not in budget | search}
    rest["budget"] = bh.Budget(**{name: options[name] for name in budget})
    return rest | {"search": bh.Search(**{name: options[name] for name in search})}


def shrink(model, batches=None, **options):
    return bh.shrink(model, batches=batches, **in_objects(options))


def Shrinking(**options):  # noqa: N802 - as the class that it makes
    return bh.Shrinking(**in_objects(options))
