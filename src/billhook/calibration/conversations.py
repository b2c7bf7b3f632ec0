"""Tokenizes text, chats, and prompts with responses, and marks the tokens of the loss."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from billhook.calibration.reading import Rows, column_names

CHAT_COLUMNS = ("messages", "conversations")
"""Columns that hold chats."""
TOOLS_COLUMN = "tools"
"""Column with the tools that the assistant of a chat may call."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "user": "user", "assistant": "assistant"}
"""Speaker names of ShareGPT and of chat templates, with their roles."""

Chat = list[dict[str, Any]]
Tools = list[dict[str, Any]]


def parse_chat(messages: list[Any], column: str) -> Chat:
    """Returns a chat in the form that chat templates take.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value` (ShareGPT). Null fields are dropped, because
            `datasets` adds them if messages differ in their keys.
        column: Name of the column, for error messages.

    Raises:
        ValueError: If a message has other fields, or `from` is not a known speaker.

    >>> parse_chat([{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}], "conversations")
    [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'He.'}]
    """
    chat = Chat()
    for message in messages:
        fields = _without_null(message)
        if isinstance(fields, dict) and isinstance(fields.get("role"), str):
            chat.append(fields)
            continue
        if not isinstance(fields, dict) or not isinstance(fields.get("from"), str) or not isinstance(fields.get("value"), str):
            raise ValueError(
                f"the column '{column}' must hold chats: lists of messages with 'role' and 'content', or with 'from' and "
                f"'value'. Got the message {message!r}."
            )
        if fields["from"] not in ROLES:
            raise ValueError(f"the column '{column}': from={fields['from']!r} must be one of {', '.join(ROLES)}.")
        chat.append({"role": ROLES[fields["from"]], "content": fields["value"]})
    return chat


def parse_tools(value: object) -> Tools | None:
    """Returns the tools of a row (a list of descriptions, or JSON of it), or None.

    Raises:
        ValueError: If it is neither.

    >>> parse_tools('[{"name": "now"}]'), parse_tools([])
    ([{'name': 'now'}], None)
    """
    tools = _without_null(value)
    if isinstance(value, str):
        with suppress(ValueError):  # invalid JSON raises below, like any value that is not a list
            tools = json.loads(value.strip() or "null")
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"the column '{TOOLS_COLUMN}' must hold lists of tools, each described by a JSON schema, or JSON of such a list. "
            f"Got {str(value)[:200]!r}. Rename the column if it holds something else."
        )
    return tools


def _without_null(data: object) -> Any:  # noqa: ANN401 - plain data of any kind
    """Returns plain data without null fields."""
    if isinstance(data, Mapping):
        return {key: _without_null(value) for key, value in data.items() if value is not None}
    return [_without_null(value) for value in data] if isinstance(data, list) else data


PROMPT_COLUMNS = (("prompt", "response"), ("prompt", "completion"))
"""Column pairs of prompts and responses."""
CHARACTERS = 2**18
"""Characters that are tokenized at once, unless a single text is longer."""
ROWS_AT_ONCE = 10_000
"""Rows that are read at once."""
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Tag with which a chat template marks the tokens that the assistant generates."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of a row, with True for each token that the loss covers."""

    ids: list[int]
    learned: list[bool]


def find_text_columns(rows: Rows, split: str, column: str) -> list[str]:
    """Returns the columns of a split that hold text, chats, or prompts and responses.

    Raises:
        ValueError: If there are none.
    """
    names = column_names(rows)
    for columns in ((column,), *((chats,) for chats in CHAT_COLUMNS), *PROMPT_COLUMNS):
        if set(columns) <= set(names):
            return list(columns)
    raise ValueError(
        f"the split '{split}' has no column '{column}', no chats ({' or '.join(CHAT_COLUMNS)}), and no 'prompt' and 'response'. "
        f"It has {', '.join(names) or 'no rows'}."
    )


def warn_of_empty_rows(rows: Rows, split: str, columns: Sequence[str]) -> None:
    """Warns of rows that are null or have no text to train on. Streams are not checked."""
    import datasets
    from pyarrow import compute, types

    if not isinstance(rows, datasets.Dataset):
        return
    empty = 0
    for table in rows.select_columns(list(columns)).with_format("arrow").iter(ROWS_AT_ONCE):
        *before, last = (table[column] for column in columns)
        if types.is_list(last.type) or types.is_large_list(last.type):
            length = compute.list_value_length(last)
        elif types.is_string(last.type) or types.is_large_string(last.type):
            length = compute.binary_length(compute.utf8_trim_whitespace(last))
        else:
            length = compute.if_else(compute.is_null(last), 0, 1)
        present = [compute.fill_null(length, 0).to_pylist()]  # a prompt may be blank, its response must not
        present += [compute.is_valid(column).to_pylist() for column in before]
        empty += sum(not all(row) for row in zip(*present, strict=True))
    if empty:
        quoted = " or ".join(f"'{column}'" for column in columns)
        warnings.warn(
            f"data: {empty:,} of {len(rows):,} rows of the split '{split}' have no text in the column {quoted} and are skipped.",
            stacklevel=2,
        )


def is_text(rows: Rows, columns: Sequence[str]) -> bool:
    """Returns True for plain text; reads the first row of a stream without known column types."""
    if len(columns) > 1:
        return False
    import datasets

    kind = (rows.features or {}).get(columns[0])
    if kind is not None:
        return isinstance(kind, datasets.Value)
    first: dict[str, Any] = next(iter(rows), {})
    return isinstance(first.get(columns[0]), str | None)


def encode(
    rows: dict[str, Any], tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], documents: bool, responses: bool
) -> Iterator[Encoded]:
    """Tokenizes rows of text, chats, or prompts with responses.

    Prompts with responses become chats if the tokenizer has a chat template.

    Args:
        rows: Columns of rows, as `datasets` passes them to a batched `map` function. Null and blank rows are skipped. The column
            `tools` lists the tools of each chat.
        tokenizer: Tokenizer, whose chat template formats chats.
        columns: Column of texts or chats, or columns of prompts and responses.
        documents: If True, each text is a document, followed by the end token. Otherwise rows are lines of one text.
        responses: If True, the loss covers only the responses of chats and prompts. For text it covers all tokens.

    Raises:
        ValueError: If a row holds something else, or responses cannot be located in the output of the chat template.
    """
    tools = rows.get(TOOLS_COLUMN) or [None] * len(rows[columns[0]])
    values = zip(*map(rows.__getitem__, columns), strict=True)
    complete = [(row, row_tools) for row, row_tools in zip(values, tools, strict=True) if None not in row]
    if len(columns) > 1:
        for (prompt, response), row_tools in complete:
            chat = Chat()
            for value, column, role in zip((prompt, response), columns, ("user", "assistant"), strict=True):
                if not isinstance(value, list):
                    check_texts([value], column)
                chat += parse_chat(value, column) if isinstance(value, list) else [{"role": role, "content": value}]
            if isinstance(response, str) and (not response or response.isspace()):
                continue
            if tokenizer.chat_template or isinstance(prompt, list) or isinstance(response, list):
                yield _chat(chat, parse_tools(row_tools), tokenizer, responses)
            else:
                span = len(prompt), len(prompt + response)
                encoded = _spans(prompt + response, [span] if responses else None, tokenizer)
                end = _end(tokenizer)
                yield Encoded(encoded.ids + end, encoded.learned + [True] * len(end))
    elif complete and isinstance(complete[0][0][0], list):
        for (messages,), row_tools in complete:
            if chat := parse_chat(messages, columns[0]):
                yield _chat(chat, parse_tools(row_tools), tokenizer, responses)
    else:
        texts = check_texts([text for (text,), _ in complete], columns[0])
        end = _end(tokenizer) if documents else []
        batch = []
        size = 0
        texts = [text for text in (texts if documents else ["".join(texts)]) if text and not text.isspace()]
        for number, text in enumerate(texts, 1):
            batch.append(text)
            size += len(text)
            # small batches: a tokenizer needs more than 100 bytes for each character
            if number == len(texts) or size + len(texts[number]) > CHARACTERS:
                for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                    yield Encoded(ids + end, [True] * (len(ids) + len(end)))
                batch = []
                size = 0


def check_texts(values: list[Any], column: str) -> list[str]:
    """Returns the values of a column. Raises if it holds anything but text."""
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"the column '{column}' must hold text in every row. Got {value!r}.")
    return values


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the end token of a document, if the tokenizer has any."""
    end: int | None = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return [] if end is None else [end]


def _chat(chat: Chat, tools: Tools | None, tokenizer: PreTrainedTokenizerBase, responses: bool) -> Encoded:
    """Tokenizes a chat, and marks the generated tokens (by template tags) or the responses."""
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: chats need a chat template, and the tokenizer has none. Name a tokenizer that has one.")
    text = _formatted(chat, tools, tokenizer)  # raises a ValueError if the template rejects the chat
    if not responses:
        return _spans(text, None, tokenizer)
    if GENERATION_TAG.search(tokenizer.get_chat_template(tools=tools)):
        encoded: Any = tokenizer.apply_chat_template(chat, tools, return_dict=True, return_assistant_tokens_mask=True)  # type: ignore[arg-type]
        return Encoded(list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]])
    spans = []
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _formatted(chat[:number], tools, tokenizer, opened=True) if number else None
        after = text if number == len(chat) - 1 else _formatted(chat[: number + 1], tools, tokenizer)
        if before is None or not after.startswith(before) or not text.startswith(after):
            reason = "a chat starts with a response" if before is None else "a response changes the text before it"
            raise ValueError(
                f"loss_on='responses': the chat template does not separate responses ({reason}). Add {{% generation %}} tags to "
                f"the template, or use loss_on='all'. The chat is {str(chat)[:200]}"
            )
        spans.append((len(before), len(after)))
    return _spans(text, spans, tokenizer)


def _formatted(chat: Chat, tools: Tools | None, tokenizer: PreTrainedTokenizerBase, opened: bool = False) -> str:
    """Formats a chat with the chat template, optionally up to the start of the next response."""
    try:
        return str(tokenizer.apply_chat_template(chat, tools, tokenize=False, add_generation_prompt=opened))  # type: ignore[arg-type]
    except TemplateError as error:
        raise ValueError(f"the chat template rejects a chat ({error}): {str(chat)[:200]}") from error


def _spans(text: str, spans: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenizes text, and marks the tokens that overlap a span; all without spans."""
    if spans is None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Encoded(list(ids), [True] * len(ids))
    if not tokenizer.is_fast:
        raise ValueError(
            f"loss_on='responses' needs the characters of each token, which {type(tokenizer).__name__} does not return. Name a "
            "fast tokenizer, or use loss_on='all'."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(start < last and end > first for first, last in spans) for start, end in encoded["offset_mapping"]]
    return Encoded(list(encoded["input_ids"]), learned)
