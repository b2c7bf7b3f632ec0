"""`billhook inspect` and `summary`: coupled units and sizes."""

import json as json_format
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from billhook.arguments import check_one_of
from billhook.checkpoints.save import load
from billhook.cli.machine import file_progress
from billhook.display import render
from billhook.engine import store_of, streamed_size
from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model import from_name, outline
from billhook.report.summary import summary as summarise
from billhook.tracing.groups import Kind
from billhook.tracing.show import group_to_json, labeled_notes
from billhook.tracing.trace import trace

CHOICES: dict[str, tuple[Kind, ...]] = {
    "heads": ("kv_head", "query_head", "head"),
    "channels": ("channel",),
    "residual": ("residual",),
    "experts": ("expert",),
    "ranks": ("rank",),
    "dimensions": ("query_key", "value", "rotary", "state"),
    "tables": ("vocab", "position", "label"),
    "fixed": ("fixed",),
}


def inspect(model: str, group: str | None = None, json: bool = False, stream: bool = False) -> None:
    """Prints the coupled units of a model, and its possible numbers of KV heads.

    Only the config is read; no weights are downloaded.

    Args:
        model: A folder, a config.json, a Hub name, or "tiny".
        group: Kind of unit to print: heads, channels, residual, experts, ranks, dimensions, tables, or fixed. Defaults to all.
        json: If true, prints everything as JSON.
        stream: If true, also prints the size of blocks for streaming, from the headers of the safetensors files.

    Raises:
        ValueError: If the kind is unknown, transformers has no such model, or the model cannot be traced.
    """
    if group is not None:
        check_one_of("group", group, CHOICES)
    streamed = None
    if stream:
        with file_progress(f"opening {model}"):
            store = store_of(outline(model))
        if store.holds_all:
            raise ValueError(f"stream=True: '{model}' has no blocks to stream. Remove --stream.")
        streamed = streamed_size(store)
    meta_model = from_name(model)
    structure = trace(meta_model)
    groups = [units for units in structure.groups if group is None or units.kind in CHOICES[group]]
    converted = conversion(meta_model)
    if json:
        plain = structure.to_json() | {"groups": list(map(group_to_json, groups)), "conversion": converted}
        plain |= {} if streamed is None else {"streamed": asdict(streamed)}
        print(json_format.dumps(plain, indent=1))
        return
    print(structure.show(groups))
    notes = [("conversion", converted["says"])] if group in (None, "heads") else []
    notes += [] if streamed is None else [("streaming", streamed.text())]
    if notes:
        print(f"\n{render(labeled_notes(notes))}")


def summary(model: str, stream: bool = False) -> None:
    """Prints the size of a model: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a Hub name, or "tiny".
        stream: If true, does not load the model: zeros are counted in the files, a few rows at a time, but not on the Hub.
    """
    with file_progress(f"{'opening' if stream else 'loading'} {model}"):
        size = summarise(outline(model) if stream else load(model))
    print(size)


def conversion(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the possible numbers of KV heads of a model, and a sentence (`says`) on them."""
    legal = []
    reason = "it has one KV head"
    try:
        before = kv_heads_of(model)
    except ValueError as error:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {error}"}
    for number in [n for n in range(1, before) if before % n == 0]:
        try:
            plan_kv_heads(model, number)
            legal.append(number)
        except ValueError as error:
            reason = str(error)
    says = f"{before} KV heads to {' or '.join(map(str, legal))}" if legal else f"no: {reason}"
    return {"num_key_value_heads": before if legal or before == 1 else None, "legal": legal, "says": says}
