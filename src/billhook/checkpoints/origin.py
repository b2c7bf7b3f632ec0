"""Origin of a model: its base model on the Hub, and its license."""

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

from billhook.assets import model_path
from billhook.atomic_folder import RECORD

CARD = "README.md"
"""File name of the model card."""
LONGEST = 200
"""Maximum number of characters of a license name or link."""


def hub_name(name: str) -> str | None:
    """Returns a name if it is a Hub name, not a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else name


def origin_of(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """Returns the origin of a model for a record: base model or folder, and license.

    `base_model` is the Hub name, for a billhook checkpoint the one in its record. Otherwise `made_of` has the name of the folder
    and the model's class. `license`, `license_name`, and `license_link` come from the model card, or `license` from the config.
    Nothing is downloaded: a model card on the Hub is used if it is in the cache.
    """
    origin: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        record = json.loads(Path(name, RECORD).read_text(encoding="utf-8")) if name else {}
        base = record.get("base_model")
        made_of = record.get("made_of")
        if isinstance(base, str) and hub_name(base):
            recorded = {"base_model": base}
        elif isinstance(made_of, dict) and _is_text(made_of.get("name")):
            recorded = {part: made_of[part] for part in ("name", "class") if _is_text(made_of.get(part))}
    # huggingface_hub's cache names the folder of a model "models--user--name"
    cached = next((part for part in Path(name).parts if part.startswith("models--")), "").split("--")[1:]
    base = hub_name(name) or hub_name("/".join(cached)) or recorded.get("base_model") if name else None
    if base:
        origin["base_model"] = base
    elif name:
        kind = next(iter(config.architectures or []), None)
        folder = "tiny" if name == model_path("tiny") else Path(name).resolve().name
        origin["made_of"] = recorded or {"name": folder, **({"class": kind} if kind else {})}
    card: Mapping[str, Any] = {}
    file = try_to_load_from_cache(name, CARD) if hub_name(name) else Path(name) / CARD
    if name and isinstance(file, str | Path) and Path(file).is_file():
        with suppress(OSError, ValueError, YAMLError, RecursionError):
            card = metadata_load(file) or {}
    stated = card.get("license") or vars(config).get("license")
    if not _is_text(stated):
        return origin
    origin["license"] = stated
    license_name = card.get("license_name")
    link = card.get("license_link")
    if _is_text(license_name):
        origin["license_name"] = license_name
    if _is_text(link) and str(link).startswith(("https://", "http://")):  # a link to a file would be broken
        origin["license_link"] = link
    return origin


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST
