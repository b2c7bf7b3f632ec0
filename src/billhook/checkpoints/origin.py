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

from billhook.atomic_folder import RECORD

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

    That is the hub's name for it as `base_model`, of a folder that billhook wrote the one in its record, or else the folder's
    name and the model's class as `made_of`; and the licence that its model card or config names as `license`, with
    `license_name` and `license_link` where the card has them. Nothing is fetched: a card of the hub is read if it was downloaded.
    """
    origin: dict[str, Any] = {}
    recorded = _recorded(Path(name)) if name else {}
    if name and (base := hub_name(name) or _in_cache(name) or recorded.get("base_model")):
        origin["base_model"] = base
    elif name:
        kind = next(iter(config.architectures or []), None)
        origin["made_of"] = recorded or {"name": Path(name).resolve().name, **({"class": kind} if kind else {})}
    card = _card_of(name) if name else {}
    stated = card.get("license") or vars(config).get("license")
    if not _is_text(stated):
        return origin
    origin["license"] = stated
    if _is_text(license_name := card.get("license_name")):
        origin["license_name"] = license_name
    if _is_text(link := card.get("license_link")) and str(link).startswith(("https://", "http://")):  # a file would not be there
        origin["license_link"] = link
    return origin


def _in_cache(name: str) -> str | None:
    """Returns the hub's name of a model whose folder lies in the cache of huggingface_hub."""
    folder = next((part for part in Path(name).parts if part.startswith("models--")), "")
    return hub_name("/".join(folder.split("--")[1:]))


def _recorded(folder: Path) -> dict[str, Any]:
    """Returns what the record in a folder of billhook's says that was made of: a model of the hub, or another folder."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        base, made_of = record.get("base_model"), record.get("made_of")
        if isinstance(base, str) and hub_name(base):
            return {"base_model": base}
        if isinstance(made_of, dict) and _is_text(made_of.get("name")):
            return {part: made_of[part] for part in ("name", "class") if _is_text(made_of.get(part))}
    return {}


def _card_of(name: str) -> Mapping[str, Any]:
    """Returns the front matter of a model's card, empty where it has none that can be read."""
    file = try_to_load_from_cache(name, CARD) if hub_name(name) else Path(name) / CARD
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    with suppress(OSError, ValueError, YAMLError, RecursionError):
        return metadata_load(file) or {}
    return {}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST
