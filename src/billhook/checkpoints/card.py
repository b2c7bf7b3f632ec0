"""Writes a model card of what the record beside a checkpoint says: what was done, sizes, damage, and how it is loaded."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PretrainedConfig

from billhook.model.shapes.shape import KEY
from billhook.serving.verdicts import told, verdicts

CARD = "README.md"
"""The name of the file."""
SIZES = {
    "params": "parameters",
    "zeros": "of them zero",
    "kv_cache_bytes": "key/value cache, bytes per token",
    "flops": "forward FLOPs per token",
}
LOSSES = ("source", "inside", "before", "after", "ratio", "ratio_error", "kl", "kl_error")
READ = "By what was read in the engines' code, in the releases named."
EXPLAINED = (
    "± are standard errors over rows of text, of differences row by row. KL is the divergence of next-token predictions from the "
    "dense model's, in nats."
)


def hub_name(name: str) -> str | None:
    """Returns a model's name if it is one of the hub, not a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else name


def card(record: Mapping[str, Any], loading: str, config: PretrainedConfig) -> str:
    """Makes a model card, with the metadata that the hub reads, of a record, words that say how it is loaded, and its config."""
    named = record.get("base_model")
    base = hub_name(named) if isinstance(named, str) else None
    data = ModelCardData(base_model=base, library_name="transformers", tags=["billhook"])
    folder = Path(record["saved"]["folder"]).resolve().name
    parts = [f"---\n{data.to_yaml().strip()}\n---", f"# {folder}"]
    parts += [f"Made of [{base}](https://huggingface.co/{base}) with billhook."] if base else []
    for title, own in (("What was done", _done(record)), ("What it costs", _costs(record))):
        parts += [f"## {title}", *own] if own else []
    how = f'```python\nimport billhook\n\nmodel = billhook.load("{folder}")\n```'
    parts += ["## How to load it", f"It is {loading}.", how, "## Where it runs", *_engines(record, config)]
    return "\n\n".join(parts) + "\n"


def _engines(record: Mapping[str, Any], config: PretrainedConfig) -> list[str]:
    """Makes a table of which engines run it."""
    events = [one["after"] for one in listed(record, "events", ("after",)) if isinstance(one["after"], Mapping)]
    kind, zeros = (config.architectures or [""])[0], events[-1].get("zeros") if events else 0
    found = verdicts(kind, config, vars(config).get(KEY), zeros=isinstance(zeros, int) and zeros > 0)
    return [_table(["engine", "runs it"], [list(one) for one in told(found)]), READ]


def _done(record: Mapping[str, Any]) -> list[str]:
    """Lists the events of a fit or a command, and shows sizes before the first and after the last."""
    events = listed(record, "events", ("what", "before", "after"))
    events = [one for one in events if isinstance(one["before"], Mapping) and isinstance(one["after"], Mapping)]
    when = [f"step {one['step']}: " if "step" in one else "" for one in events]
    lines = [f"- {at}{_plain(one['what'])}{_settled(one)}" for at, one in zip(when, events, strict=True)]
    if isinstance(steps := record.get("steps"), int):
        lines.append(f"- training, {steps:,} steps")
    rows = []
    if events:
        before, after = events[0]["before"], events[-1]["after"]
        rows = [[name, before.get(key), after.get(key)] for key, name in SIZES.items() if after.get(key) is not None]
    return ["\n".join(lines)] * bool(lines) + [_table(["", "before", "after"], rows)] * bool(rows)


def _settled(event: Mapping[str, Any]) -> str:
    """Says how far the choice of what is removed follows from the examples, where an event does."""
    return "".join(f"\n  - {_plain(one['says'])}" for one in listed(event, "settled", ["says"]))


def _costs(record: Mapping[str, Any]) -> list[str]:
    """Shows what is lost on each text, or of a classifier's accuracy."""
    accuracy, rows = record.get("accuracy"), list[list[object]]()
    if isinstance(accuracy, Mapping) and {"before", "after"} <= accuracy.keys() and accuracy["after"] is not None:
        return [_table(["", "before", "after"], [["accuracy", accuracy["before"], accuracy["after"]]])]
    damage, when = listed(record, "damage", LOSSES), ""
    for event in listed(record, "events", ("step", "damage"))[-1:] if not damage else ():
        damage, when = listed(event, "damage", LOSSES), f"Right after what was done at step {_plain(event['step'])}:"
    for one in damage:
        where = "calibrated on" if one["inside"] else "not calibrated on"
        pairs = [_with_error(one[name], one[f"{name}_error"]) for name in ("ratio", "kl")]
        rows.append([one["source"], where, one["before"], one["after"], *pairs])
    shown = [_table(["perplexity on", "", "before", "after", "ratio", "KL"], rows), EXPLAINED] if rows else []
    return [when, *shown] if when and shown else shown


def listed(record: Mapping[str, Any], name: str, keys: Collection[str]) -> list[Mapping[str, Any]]:
    """Returns the entries of a list in a record, which may be anybody's, that say what billhook's own do."""
    found = record.get(name)
    entries = found if isinstance(found, list) else []
    return [one for one in entries if isinstance(one, Mapping) and all(key in one for key in keys)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *([_number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_error(value: object, error: object) -> str:
    if not isinstance(value, float):  # a number that JSON lacks is a word
        return "unknown"
    return f"{value:,.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else _plain(value)


def _plain(value: object) -> str:
    """Returns text that is no Markdown of a table or a line."""
    return " ".join(str(value).split()).replace("|", "\\|")
