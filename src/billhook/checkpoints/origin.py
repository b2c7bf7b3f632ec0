"""Finds what a model was made of: the model of the hub, and its licence."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PretrainedConfig
from yaml import YAMLError

from billhook.place import RECORD

CARD = "README.md"
"""The name of the file that holds a model card."""
LONGEST = 200
"""Characters that a licence's name or address has at most."""


def hub_name(name: str) -> str | None:
    """Returns a model's name if it is one of the hub, not a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else name


def origin_of(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """Returns what a record says of the model that a name or folder holds.

    That is the hub's name for it as `base_model`, of a folder that billhook wrote the one in its record, and the licence that its
    model card or config names as `license`, with `license_name` and `license_link` where the card has them. Nothing is fetched:
    a card of the hub is read if it was downloaded.
    """
    found: dict[str, Any] = {}
    if name and (base := hub_name(name) or _recorded(Path(name))):
        found["base_model"] = base
    card = _card_of(name) if name else {}
    stated = card.get("license") or vars(config).get("license")
    if not _is_text(stated):
        return found
    found["license"] = stated
    if _is_text(own := card.get("license_name")):
        found["license_name"] = own
    if _is_text(link := card.get("license_link")) and str(link).startswith(("https://", "http://")):  # a file would not be there
        found["license_link"] = link
    return found


def _recorded(folder: Path) -> str | None:
    """Returns the model of the hub that the record in a folder of billhook's names."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        base = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("base_model")
        return hub_name(base) if isinstance(base, str) else None
    return None


def _card_of(name: str) -> Mapping[str, Any]:
    """Returns the front matter of a model's card, empty where it has none that can be read."""
    place = try_to_load_from_cache(name, CARD) if hub_name(name) else Path(name) / CARD
    if not isinstance(place, str | Path) or not Path(place).is_file():
        return {}
    with suppress(OSError, ValueError, YAMLError, RecursionError):
        return metadata_load(place) or {}
    return {}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST
