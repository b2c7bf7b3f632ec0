"""The model card of a checkpoint: changes, sizes, degradation, and how to load it."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from billhook.checkpoints.origin import hub_name

Record = Mapping[str, Any]
"""The record of a checkpoint, or a part of it."""


def listed(record: Record, name: str, keys: Collection[str]) -> list[Record]:
    """Returns the entries of a list in an untrusted record that have the given keys."""
    value = record.get(name)
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping) and all(key in entry for key in keys)]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], align: str = "---:") -> str:
    """Returns a Markdown table of escaped cells; `align` skips the first column."""
    lines = [heads, ["---", *[align] * (len(heads) - 1)], *([number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: object) -> str:
    """Formats a float with four digits and an integer in full, and escapes text."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else plain(value)


def with_error(value: object, error: object) -> str:
    """Formats a number with its standard error; either may be missing."""
    if not isinstance(value, float) or math.isnan(value):
        return "unknown"
    return f"{value:,.3f}" + (f" ± {error:.3f}" if isinstance(error, float) and not math.isnan(error) else "")


def plain(value: object) -> str:
    r"""Escapes Markdown and HTML, and joins lines.

    >>> print(plain("4 -> 2 <b>heads</b> | [a](b) *c* `d` _e_ snake_case"))
    4 -> 2 &lt;b>heads&lt;/b> \| \[a\](b) \*c\* \`d\` \_e\_ snake_case
    """
    escaped = re.sub(r"[\\`*\[\]|#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(value).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


OTHER_SECTIONS = {
    *("base_model", "made_of", "license", "license_name", "license_link", "saved", "files"),
    *("events", "steps", "start", "degradation", "accuracy", "perplexity", "bits_per_byte", "metrics", "written"),
}
"""Keys of a record that other sections of the card show."""
MAX_SETTING = 150
"""Maximum number of characters of one setting; longer ones, such as plans, are left to the record."""


def settings(record: Record) -> list[tuple[str, str]]:
    """Returns names and settings of callbacks that changed the model, and other short entries."""
    pairs = []
    for event in listed(record, "events", ("by",)):
        if isinstance(event["by"], Mapping):
            parameters = dict(event["by"])
            pairs.append((str(parameters.pop("callback", None)), words(parameters)))
    pairs += [(str(name), words(value)) for name, value in record.items() if name not in OTHER_SECTIONS]
    return [pair for pair in dict.fromkeys(pairs) if pair[1]]


def words(value: object, within: bool = False) -> str:
    """Returns a value as a single line; empty if it is too long."""
    if isinstance(value, Mapping):
        line = "; ".join(f"{name} {text}" for name, part in value.items() if (text := words(part, True)))
        return line if not within else f"({line})" if line and len(line) <= MAX_SETTING else ""
    if isinstance(value, list):
        items = list(map(partial(words, within=True), value))
        line = ", ".join(items) if all(items) and not any(isinstance(item, Mapping) for item in value) else ""
    elif isinstance(value, float):
        line = f"{value:g}"
    else:
        line = "" if value is None else str(value)
    return line if len(line) <= MAX_SETTING else ""


RELATION = "finetune"
"""Relation to the base model. The Hub knows finetune, adapter, merge, and quantized, but no term for pruning."""
SIZES = {
    "params": "parameters",
    "zeros": "zero parameters",
    "kv_cache_bytes": "KV-cache bytes per token",
    "flops": "FLOPs per token or image",
}
LOSSES = ("source", "inside", "before", "after", "ratio", "ratio_error", "kl", "kl_error")
WRITINGS = ("temperature", "before", "after")
SPARSE = 0.1
"""Share of zeros from which a model is tagged as sparse."""
COMPLETE = "See `billhook.json` for the complete record, such as the removed units."
UNRECORDED = "No record of the changes: billhook.save was called without record=."
LEGEND = (
    "± is the paired standard error over examples. KL is the divergence of next-token predictions from the dense model, in nats. "
    "`same token` is the share of positions with the same most likely token, and `accepted` the share of drafted tokens that the "
    "dense model would accept in speculative sampling."
)
OUTPUTS_LEGEND = (
    "± is the standard error over examples. The outputs at each token are compared with the dense model's: KL is the divergence "
    "of predictions, in nats, `same label` the share of tokens with the same class, and `cosine` that of token states."
)
BITS_LEGEND = "The tokenizers differ, so losses per token are not comparable. `tokens` counts those of the same text."
WRITTEN_LEGEND = (
    "Both models have continued the same prompts. A text loops if fewer than 0.55 of its 4-grams are distinct, or if it does not "
    "end and its last phrase repeats three times."
)
COMPARED = {"kl": "KL", "agreement": "same token", "acceptance": "accepted", "cosine": "cosine"}
"""Columns of figures that compare outputs."""


def card(record: Record, loading: str, config: PretrainedConfig) -> str:
    """Returns a model card, with the Hub's metadata.

    Args:
        record: The record of the checkpoint.
        loading: Format of the checkpoint, in words.
        config: Config of the checkpoint.
    """
    named = record.get("base_model")
    base = hub_name(named) if isinstance(named, str) else None
    license_fields = ("license", "license_name", "license_link")
    fields = {field: record[field] for field in license_fields if isinstance(record.get(field), str)}
    fields |= {"base_model_relation": RELATION} if base else {}
    library = "billhook" if record["saved"]["way"] == "shaped" else "transformers"
    tags = ["billhook"]
    before, after = _sizes(record)
    sizes = [size_of.get(name) for name in ("params", "zeros") for size_of in (before, after)]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes):  # fewer parameters or more zeros, and many more zeros
        params, fewer, zeros, more = known
        sparse = zeros < more and more >= SPARSE * fewer
        tags += ["pruned"] * (sparse or fewer < params) + ["sparse"] * sparse
    data = ModelCardData(base_model=base, **fields, library_name=library, tags=tags)
    made_of = record.get("made_of")
    kind = (config.architectures or ["a model"])[0]
    folder = dict(made_of) if isinstance(made_of, Mapping) else {}
    done = "pruned" if "pruned" in tags else "changed" if _measured(record) else "saved"
    title = f"# {plain(base.rpartition('/')[2] if base else folder.get('name') or kind)}, {done} with billhook"
    parts = [f"---\n{data.to_yaml().strip()}\n---", title]
    if base:
        parts.append(f"Made from [{base}](https://huggingface.co/{base}) with billhook.")
    elif folder.get("name"):
        size = before.get("params")
        about = [plain(folder.get("class", kind)), *([f"{size:,} parameters"] if isinstance(size, int) else [])]
        parts.append(f"Made from a local folder, {plain(folder['name'])} ({', '.join(about)}).")
    for title, section in (("Changes", _changes(record)), ("Size and quality", _quality(record))):
        parts += [f"## {title}", *section] if section else []
    quoted = json.dumps(record["saved"]["folder"], ensure_ascii=False)
    code = f"import billhook\n\nmodel = billhook.load({quoted})  # this folder, or its Hub name"
    if library == "transformers" and hasattr(transformers, kind):
        code = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({quoted})  # or its Hub name"
    parts += ["## Usage", f"{loading[0].upper()}{loading[1:]}.", f"```python\n{code}\n```"]
    return "\n\n".join(parts) + "\n"


def _sizes(record: Record) -> tuple[Record, Record]:
    """Returns sizes before the first event and after the last."""
    events = _measured(record)
    return (events[0]["before"], events[-1]["after"]) if events else ({}, {})


def _measured(record: Record) -> list[Record]:
    events = listed(record, "events", ("what", "before", "after"))
    return [event for event in events if isinstance(event["before"], Mapping) and isinstance(event["after"], Mapping)]


def _changes(record: Record) -> list[str]:
    """Returns the list of events, the settings, and the sizes."""
    lines = []
    for event in _measured(record):
        step = f"step {plain(event['step'])}: " if "step" in event else ""
        not_refitted = [plain(event["not_refitted"])] if event.get("not_refitted") else []
        what = plain(event["what"])
        label = plain(event.get("label", event["what"]))
        lines.append("\n  - ".join([f"- {step}{label}", *([] if label == what else [what]), *not_refitted]))
    steps = record.get("steps")
    if isinstance(steps, int):
        lines.append(f"- {steps:,} training steps")
    used = settings(record)
    recorded = bool(lines) or any(name != "versions" for name, _ in used)
    parts = ["\n".join(lines)] * bool(lines) if recorded else [UNRECORDED]
    parts += [table(["by", "settings"], used, "---")] * bool(used)
    parts += [COMPLETE] if used and recorded else []
    before, after = _sizes(record)
    last = _mapping(record, "metrics")
    start = _mapping(record, "start")
    if not any(key.startswith("val") and start[key] != before.get(key) for key in start):
        start = {}  # the same as `before`
    columns = ({"at the start": start} if start else {}) | {"before": before, "after": after}
    columns |= {"at the last validation": last} if last else {}
    rows = []
    for key in dict.fromkeys((*SIZES, *after, *last)):
        if (key in SIZES and after.get(key) is not None) or (key.startswith("val") and (key in before or key in last)):
            rows.append([SIZES.get(key) or plain(key), *(sizes.get(key) for sizes in columns.values())])
    return parts + [table(["", *columns], rows)] * bool(rows)


def _mapping(record: Record, name: str) -> Record:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def degradation_rows(texts: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and cells of a table of degradation by text, with standard errors.

    It shows perplexity, or bits per byte and the number of tokens if the changed model has another tokenizer, or no loss if the
    models predict no next token. Columns without a figure are left out.

    Args:
        texts: Results of `TextDegradation.to_json`, or what an untrusted record has instead.
    """
    in_bits = any(text.get("bits_per_byte") for text in texts)
    measured = {name for text in texts for name in COMPARED if isinstance(text.get(name), float)} if not in_bits else set()
    columns = {name: head for name, head in COMPARED.items() if name in measured}
    has_loss = any(text["before"] != "nan" for text in texts)
    rows = []
    for text in texts:
        losses, ratio, error = [text["before"], text["after"]], text["ratio"], text["ratio_error"]
        compared = [with_error(text.get(name), text.get(f"{name}_error")) for name in columns]
        match text.get("bits_per_byte"):
            case [float(before), float(after)] if before > 0:
                losses, ratio, error = [before, after], after / before, text.get("bits_ratio_error")
                compared = [with_error(text.get("token_ratio"), None)]
        where = "calibrated on" if text["inside"] else "not calibrated on"
        shown = [*map(number, losses), with_error(ratio, error)] if has_loss else []
        rows.append([str(text["source"]), where, *shown, *compared])
    if not has_loss:
        return ["outputs on", "", *("same label" if name == "agreement" else head for name, head in columns.items())], rows
    of = "bits per byte of" if in_bits else "perplexity on"
    return [of, "", "before", "after", "ratio", *(["tokens"] if in_bits else columns.values())], rows


def _legend(heads: Sequence[str]) -> str:
    return BITS_LEGEND if "tokens" in heads else LEGEND if "before" in heads else OUTPUTS_LEGEND


def written_rows(written: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and cells of a table of written text from `Written.to_json`."""
    rows = []
    for texts in written:
        before, after = _mapping(texts, "before"), _mapping(texts, "after")
        pairs = [(before.get(name), after.get(name)) for name in ("loop_share", "distinct", "tokens", "ended")]
        temperature = texts["temperature"]
        decoding = f"T={number(temperature)}" if temperature else "greedy"
        rows.append([decoding, number(after.get("texts")), *(f"{number(old)} -> {number(new)}" for old, new in pairs)])
    return ["texts written", "", "loop", "distinct 4-grams", "tokens", "ended"], rows


def _quality(record: Record) -> list[str]:
    """Returns tables of the degradation on texts and of written text, or of accuracy."""
    accuracy = record.get("accuracy")
    if isinstance(accuracy, Mapping) and {"before", "after"} <= accuracy.keys() and accuracy["after"] is not None:
        return [table(["", "before", "after"], [["accuracy", accuracy["before"], accuracy["after"]]])]
    when, measured = [], record
    for event in listed(record, "events", ("step", "degradation"))[-1:] if not listed(record, "degradation", LOSSES) else ():
        when, measured = [f"Right after step {plain(event['step'])}:"], event
    parts = []
    if degradation := listed(measured, "degradation", LOSSES):
        heads, rows = degradation_rows(degradation)
        parts = [*when, table(heads, rows), _legend(heads)]
        if all(text["inside"] for text in degradation):
            parts.append("Only text of the calibration sources was measured. Other text may degrade more.")
    if written := listed(measured, "written", WRITINGS):
        parts += [table(*written_rows(written)), WRITTEN_LEGEND]
    return parts
