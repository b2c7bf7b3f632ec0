"""Reads what callbacks have noted of a fit in its Lightning checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

from billhook.checkpoints.card import LOSSES
from billhook.checkpoints.markdown import listed

EVENT = ("number", "step", "what", "before", "after")
"""What each event of a fit says."""
TRAINED = "billhook_trained"
"""The key of Lightning checkpoints under which they keep how the model was trained."""


def history(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `Export` records of a fit: how it was trained, its events in order, and the damage at its end if measured.

    What is not as billhook notes it, as anybody may have written the file, is left out.
    """
    held = checkpoint.get("callbacks")
    states = [own for own in held.values() if isinstance(own, Mapping)] if isinstance(held, Mapping) else []
    events = [one for state in states for one in listed(state, "events", EVENT) if _is_event(one)]
    damage = [one for state in states for one in listed(state, "last", LOSSES) if _is_plain(one)]
    starts = [own for state in states if isinstance(own := state.get("start"), Mapping) and own and _is_plain(own)]
    noted = checkpoint.get(TRAINED)
    trained = {name: noted.get(name) for name in ("training", "metrics")} if isinstance(noted, Mapping) else {}
    found: dict[str, Any] = {"start": dict(starts[0])} if starts else {}
    found |= {"events": sorted(events, key=lambda event: (event["step"], event["number"]))}
    found |= {name: dict(own) for name, own in trained.items() if isinstance(own, Mapping) and _is_plain(own)}
    return found | ({"damage": damage} if damage else {})


def _is_event(event: Mapping[str, Any]) -> bool:
    return all(type(event[name]) is int for name in ("number", "step")) and _is_plain(event)


def _is_plain(value: Mapping[str, Any]) -> bool:
    """Tells whether JSON can say a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
