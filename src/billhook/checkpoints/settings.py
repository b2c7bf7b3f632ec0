"""Says by what a model was made: criterion, data, seed, versions and whatever else a record holds beside events and figures."""

from collections.abc import Mapping
from typing import Any

from billhook.checkpoints.markdown import listed

ELSEWHERE = {
    *("base_model", "made_of", "license", "license_name", "license_link", "saved", "files"),
    *("events", "steps", "start", "damage", "accuracy", "perplexity", "metrics"),
}
"""What of a record the other parts of a card show."""
LONGEST = 150
"""Characters of one setting at most; what is longer, such as a plan, is left to the record."""


def settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns pairs of a name and words: the callbacks that made a fit's events, and all else that a few words can say."""
    by = [one["by"] for one in listed(record, "events", ("by",)) if isinstance(one["by"], Mapping)]
    named = [(str(one.get("callback")), words({name: own for name, own in one.items() if name != "callback"})) for one in by]
    others = [(str(name), words(value)) for name, value in record.items() if name not in ELSEWHERE]
    return [pair for pair in dict.fromkeys([*named, *others]) if pair[1]]


def words(value: object, within: bool = False) -> str:
    """Says a value in a line; nothing of one that takes more."""
    if isinstance(value, Mapping):
        parts = [f"{name} {own}" for name, one in value.items() if (own := words(one, True))]
        found = "; ".join(parts)
        return found if not within else f"({found})" if found and len(found) <= LONGEST else ""
    if isinstance(value, list):
        parts = [words(one, True) for one in value]
        found = ", ".join(parts) if all(parts) and not any(isinstance(one, Mapping) for one in value) else ""
    elif isinstance(value, float):
        found = f"{value:g}"
    else:
        found = "" if value is None else str(value)
    return found if len(found) <= LONGEST else ""
