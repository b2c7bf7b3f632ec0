"""Reads chats and tools as data has them, to hand to a chat template: OpenAI's form of messages, ShareGPT's, tools as JSON."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

COLUMNS = ("messages", "conversations")
"""Columns that hold chats."""
TOOLS = "tools"
"""The column that says which tools the assistant of a chat may call."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "user": "user", "assistant": "assistant"}
"""What ShareGPT's form calls those who speak, and their roles."""

Chat: TypeAlias = list[dict[str, Any]]
Tools: TypeAlias = list[dict[str, Any]]


def chat_of(messages: list[Any], column: str) -> Chat:
    """Returns a chat as templates take it.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value`, as in ShareGPT; what is null in them is left
            out, since `datasets` fills it in where one message has no key of another.
        column: Where they stand, for messages of errors.

    Raises:
        ValueError: If a message is something else, or `from` names nobody who is known.

    >>> chat_of([{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}], "conversations")
    [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'He.'}]
    """
    return [_message(one, column) for one in messages]


def _message(message: object, column: str) -> dict[str, Any]:
    given = _given(message)
    if isinstance(given, dict) and isinstance(given.get("role"), str):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("from"), str) or not isinstance(given.get("value"), str):
        raise ValueError(
            f"the column '{column}' must hold chats, lists of messages with 'role' and 'content', or with 'from' and 'value'; "
            f"one is {message!r}"
        )
    if given["from"] not in ROLES:
        raise ValueError(f"the column '{column}': from={given['from']!r} must be one of {', '.join(ROLES)}")
    return {"role": ROLES[given["from"]], "content": given["value"]}


def tools_of(value: object) -> Tools | None:
    """Returns the tools of a row, if there are any: a list of what describes each, or JSON of it.

    >>> tools_of('[{"name": "now"}]'), tools_of([])
    ([{'name': 'now'}], None)
    """
    tools = _given(value)
    if isinstance(value, str):
        with suppress(ValueError):  # what is no JSON is refused like all that is no list
            tools = json.loads(value.strip() or "null")
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise ValueError(
            f"the column '{TOOLS}' of chats must hold lists of tools, each described by a JSON schema, or JSON of such a list; "
            f"one is {str(value)[:200]!r}: rename the column if it is none of tools"
        )
    return tools


def _given(value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    """Returns plain data without the keys that are null."""
    if isinstance(value, Mapping):
        return {key: _given(one) for key, one in value.items() if one is not None}
    return [_given(one) for one in value] if isinstance(value, list) else value
