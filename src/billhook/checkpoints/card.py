"""Writes a model card of what the record beside a checkpoint says: what was done, sizes, degradation, and how it is loaded."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import shorten
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from billhook.checkpoints.origin import hub_name
from billhook.display import markdown_table
from billhook.model.shape import KEY
from billhook.serving.engines import grouped, verdicts


def listed(record: Mapping[str, Any], name: str, keys: Collection[str]) -> list[Mapping[str, Any]]:
    """Returns the entries of a list in a record, which may be anybody's, that say what billhook's own do."""
    value = record.get(name)
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping) and all(key in entry for key in keys)]


def current_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys that older versions wrote in a record or an event: `damage` is `degradation`.

    >>> current_names({"events": [{"damage": []}]})
    {'events': [{'degradation': []}]}
    """
    renamed = {"degradation" if name == "damage" else name: value for name, value in record.items()}
    if isinstance(events := renamed.get("events"), list):
        renamed["events"] = [current_names(event) if isinstance(event, Mapping) else event for event in events]
    return renamed


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], align: str = "---:") -> str:
    """Makes a table of numbers and of words, which are escaped."""
    return markdown_table(heads, [[number(cell) for cell in row] for row in rows], align)


def number(value: object) -> str:
    """Writes a number with four digits, or a whole one in full; other values as they are."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else plain(value)


def with_error(value: object, error: object) -> str:
    """Writes a number with its standard error."""
    if not isinstance(value, float):  # a number that JSON lacks is a word
        return "unknown"
    return f"{value:,.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def plain(value: object) -> str:
    r"""Returns text in a line that is shown as it is: neither Markdown nor HTML.

    >>> print(plain("4 -> 2 <b>heads</b> | [a](b) *c* `d` _e_ snake_case"))
    4 -> 2 &lt;b>heads&lt;/b> \| \[a\](b) \*c\* \`d\` \_e\_ snake_case
    """
    line = " ".join(str(value).split())
    escaped = re.sub(r"[\\`*\[\]|#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


ELSEWHERE = {
    *("base_model", "made_of", "license", "license_name", "license_link", "saved", "files"),
    *("events", "steps", "start", "degradation", "accuracy", "perplexity", "metrics"),
}
"""What of a record the other parts of a card show."""
LONGEST = 150
"""Characters of one setting at most; what is longer, such as a plan, is left to the record."""


def settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns pairs of a name and words: the callbacks that made a fit's events, and all else that a few words can say."""
    pairs = list[tuple[str, str]]()
    for event in listed(record, "events", ("by",)):
        if isinstance(event["by"], Mapping):
            parameters = dict(event["by"])
            pairs.append((str(parameters.pop("callback", None)), words(parameters)))
    pairs += [(str(name), words(value)) for name, value in record.items() if name not in ELSEWHERE]
    return [pair for pair in dict.fromkeys(pairs) if pair[1]]


def words(value: object, within: bool = False) -> str:
    """Says a value in a line; nothing of one that takes more."""
    if isinstance(value, Mapping):
        parts = [f"{name} {said}" for name, part in value.items() if (said := words(part, True))]
        line = "; ".join(parts)
        return line if not within else f"({line})" if line and len(line) <= LONGEST else ""
    if isinstance(value, list):
        parts = [words(part, True) for part in value]
        line = ", ".join(parts) if all(parts) and not any(isinstance(part, Mapping) for part in value) else ""
    elif isinstance(value, float):
        line = f"{value:g}"
    else:
        line = "" if value is None else str(value)
    return line if len(line) <= LONGEST else ""


RELATION = "finetune"
"""The relation to the base model. The hub knows finetune, adapter, merge and quantized; what is cut is other weights, alone."""
SIZES = {
    "params": "parameters",
    "zeros": "of them zero",
    "kv_cache_bytes": "key/value cache, bytes per token",
    "flops": "FLOPs of a forward pass, per token or image",
}
LOSSES = ("source", "inside", "before", "after", "ratio", "ratio_error", "kl", "kl_error")
READ = "By what was read in the engines' code, in the releases named."
LABEL = 60
"""Characters of a label at most, of an event that has none."""
SPARSE = 0.1
"""The share of zeros from which a model counts as sparse."""
KEPT = "`billhook.json` holds the whole record, such as which units or heads went."
UNRECORDED = "Nothing was recorded of what was done to it: `billhook.save` was given no record."
EXPLAINED = (
    "± are standard errors over rows of text, of differences row by row. KL is the divergence of next-token predictions from the "
    "dense model's, in nats."
)


def card(record: Mapping[str, Any], loading: str, config: PretrainedConfig) -> str:
    """Makes a model card, with the metadata that the hub reads, of a record, words that say how it is loaded, and its config."""
    record = current_names(record)
    named = record.get("base_model")
    base = hub_name(named) if isinstance(named, str) else None
    name = record["saved"]["folder"]
    parts = [f"---\n{_metadata(record, base).to_yaml().strip()}\n---", *_title(record, base, config)]
    for title, section in (("What was done", _done(record)), ("What it costs", _costs(record))):
        parts += [f"## {title}", *section] if section else []
    parts += ["## How to load it", f"It is {loading}.", _code(record, name, config)]
    parts += ["## Where it runs", *_engines(record, config)]
    return "\n\n".join(parts) + "\n"


def label_of(event: Mapping[str, Any]) -> str:
    """Returns a few words for an event of a fit; one of an older billhook has none, and is cut off."""
    label = event.get("label")
    return label if isinstance(label, str) else shorten(str(event["what"]), LABEL, placeholder=" ...")


def _title(record: Mapping[str, Any], base: str | None, config: PretrainedConfig) -> list[str]:
    """Names the model that it was made of: on the hub, or by the folder's name, class and size."""
    made_of = record.get("made_of")
    folder = dict(made_of) if isinstance(made_of, Mapping) else {}
    kind = (config.architectures or ["a model"])[0]
    done = "pruned" if "pruned" in _tags(*_sizes(record)) else "changed" if _measured(record) else "saved"
    title = f"# {plain(base.rpartition('/')[2] if base else folder.get('name') or kind)}, {done} with billhook"
    if base:
        return [title, f"Made of [{base}](https://huggingface.co/{base}) with billhook."]
    size = _sizes(record)[0].get("params")
    about = [plain(folder.get("class", kind)), *([f"{size:,} parameters"] if isinstance(size, int) else [])]
    return [title, *([f"Made of a local folder, {plain(folder['name'])} ({', '.join(about)})."] if folder.get("name") else [])]


def _metadata(record: Mapping[str, Any], base: str | None) -> ModelCardData:
    """Returns what the hub reads: base model, licence, library, and tags by what has become of the sizes."""
    licence = {name: record[name] for name in ("license", "license_name", "license_link") if isinstance(record.get(name), str)}
    fields: dict[str, Any] = licence | ({"base_model_relation": RELATION} if base else {})
    library = "billhook" if record["saved"]["way"] == "shaped" else "transformers"
    return ModelCardData(base_model=base, **fields, library_name=library, tags=["billhook", *_tags(*_sizes(record))])


def _tags(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Says what has become of the sizes: fewer parameters, or more of them zero, a tenth at least."""
    sizes = [figures.get(name) for name in ("params", "zeros") for figures in (before, after)]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        return []
    params, fewer, zeros, more = known
    sparse = zeros < more and more >= SPARSE * fewer
    return ["pruned"] * (sparse or fewer < params) + ["sparse"] * sparse


def _sizes(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns figures before the first event and after the last."""
    events = _measured(record)
    return (events[0]["before"], events[-1]["after"]) if events else ({}, {})


def _measured(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the events of a fit or a command that say figures before and after."""
    events = listed(record, "events", ("what", "before", "after"))
    return [event for event in events if isinstance(event["before"], Mapping) and isinstance(event["after"], Mapping)]


def _code(record: Mapping[str, Any], name: str, config: PretrainedConfig) -> str:
    """Shows the lines that load it: by transformers alone if that can, and by billhook."""
    kind = (config.architectures or ["?"])[0]
    quoted = json.dumps(name, ensure_ascii=False)
    lines = ["import billhook", "", f"model = billhook.load({quoted})  # this folder, or its name on the hub"]
    if record["saved"]["way"] != "shaped" and hasattr(transformers, kind):
        lines = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({quoted})  # or its name on the hub"]
    return "\n".join(["```python", *lines, "```"])


def _engines(record: Mapping[str, Any], config: PretrainedConfig) -> list[str]:
    """Makes a table of which engines run it."""
    figures = [event["after"] for event in listed(record, "events", ("after",)) if isinstance(event["after"], Mapping)]
    kind, zeros = (config.architectures or [""])[0], figures[-1].get("zeros") if figures else 0
    rows = grouped(verdicts(kind, config, vars(config).get(KEY), zeros=isinstance(zeros, int) and zeros > 0))
    return [table(["engine", "runs it"], [list(row) for row in rows]), READ]


def _done(record: Mapping[str, Any]) -> list[str]:
    """Lists the events, and shows figures before the first, after the last and at the end, and by what all was done."""
    events = _measured(record)
    lines = [f"- step {plain(event['step'])}: {_event(event)}" if "step" in event else f"- {_event(event)}" for event in events]
    if isinstance(steps := record.get("steps"), int):
        lines.append(f"- training, {steps:,} steps")
    how = settings(record)
    recorded = bool(lines) or any(name != "versions" for name, _ in how)
    parts = ["\n".join(lines)] * bool(lines) if recorded else [UNRECORDED]
    parts += [table(["by", "settings"], how, "---")] * bool(how)
    return [*parts, *([KEPT] if how and recorded else []), *_figures(record)]


def _figures(record: Mapping[str, Any]) -> list[str]:
    """Shows sizes and what validation logged: of a fit at its start, before the first event, after the last, and at its end."""
    (before, after), last, start = _sizes(record), _mapping(record, "metrics"), _mapping(record, "start")
    if not any(key.startswith("val") and start[key] != before.get(key) for key in start):
        start = {}  # it says what stands under `before`
    names = {key: name for key, name in SIZES.items() if after.get(key) is not None}
    for key in (*after, *last):
        if key.startswith("val") and (key in before or key in last):
            names[key] = plain(key)
    columns = ({"at the start": start} if start else {}) | {"before": before, "after": after}
    columns |= {"at the last validation": last} if last else {}
    rows = [[name, *(figures.get(key) for figures in columns.values())] for key, name in names.items()]
    return [table(["", *columns], rows)] * bool(rows)


def _event(event: Mapping[str, Any]) -> str:
    """Shows the label of an event, and below it what was done, where that is more, and what was not refitted."""
    what = plain(event["what"])
    label = plain(label_of(event)) if "label" in event else what
    left = [plain(event["not_refitted"])] if event.get("not_refitted") else []
    return "\n  - ".join([label, *([] if label == what else [what]), *left])


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a part of a record that holds figures by name; empty if it is something else."""
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _costs(record: Mapping[str, Any]) -> list[str]:
    """Shows what is lost on each text, or of a classifier's accuracy."""
    accuracy, rows = record.get("accuracy"), list[list[object]]()
    if isinstance(accuracy, Mapping) and {"before", "after"} <= accuracy.keys() and accuracy["after"] is not None:
        return [table(["", "before", "after"], [["accuracy", accuracy["before"], accuracy["after"]]])]
    degradation, when = listed(record, "degradation", LOSSES), ""
    for event in listed(record, "events", ("step", "degradation"))[-1:] if not degradation else ():
        degradation, when = listed(event, "degradation", LOSSES), f"Right after what was done at step {plain(event['step'])}:"
    for text in degradation:
        where = "calibrated on" if text["inside"] else "not calibrated on"
        pairs = [with_error(text[name], text[f"{name}_error"]) for name in ("ratio", "kl")]
        rows.append([text["source"], where, text["before"], text["after"], *pairs])
    shown = [table(["perplexity on", "", "before", "after", "ratio", "KL"], rows), EXPLAINED] if rows else []
    return [when, *shown] if when and shown else shown
