"""Makes tables and lines of Markdown of values that anybody may have written."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def listed(record: Mapping[str, Any], name: str, keys: Collection[str]) -> list[Mapping[str, Any]]:
    """Returns the entries of a list in a record, which may be anybody's, that say what billhook's own do."""
    found = record.get(name)
    entries = found if isinstance(found, list) else []
    return [one for one in entries if isinstance(one, Mapping) and all(key in one for key in keys)]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], align: str = "---:") -> str:
    """Makes a table, with the columns after the first aligned alike."""
    lines = [heads, ["---"] + [align] * (len(heads) - 1), *([number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
