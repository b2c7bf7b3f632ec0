"""Turns a row of data into token ids, and marks those that a model learns of it: text, a chat, or a prompt and its response."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from billhook.calibration.reading import Rows, column_names

if TYPE_CHECKING:
    import pyarrow


CHAT_COLUMNS = ("messages", "conversations")
"""Columns that hold chats."""
TOOLS_COLUMN = "tools"
"""The column that says which tools the assistant of a chat may call."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "user": "user", "assistant": "assistant"}
"""What ShareGPT's form calls those who speak, and their roles."""

Chat: TypeAlias = list[dict[str, Any]]
Tools: TypeAlias = list[dict[str, Any]]


def parse_chat(messages: list[Any], column: str) -> Chat:
    """Returns a chat as templates take it.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value`, as in ShareGPT; what is null in them is left
            out, since `datasets` fills it in where one message has no key of another.
        column: Where they stand, for messages of errors.

    Raises:
        ValueError: If a message is something else, or `from` names nobody who is known.

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
                f"the column '{column}' must hold chats, lists of messages with 'role' and 'content', or with 'from' and "
                f"'value'; one is {message!r}"
            )
        if fields["from"] not in ROLES:
            raise ValueError(f"the column '{column}': from={fields['from']!r} must be one of {', '.join(ROLES)}")
        chat.append({"role": ROLES[fields["from"]], "content": fields["value"]})
    return chat


def parse_tools(value: object) -> Tools | None:
    """Returns the tools of a row, if there are any: a list of what describes each, or JSON of it.

    >>> parse_tools('[{"name": "now"}]'), parse_tools([])
    ([{'name': 'now'}], None)
    """
    tools = _without_null(value)
    if isinstance(value, str):
        with suppress(ValueError):  # what is no JSON is refused like all that is no list
            tools = json.loads(value.strip() or "null")
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"the column '{TOOLS_COLUMN}' must hold lists of tools, each described by a JSON schema, or JSON of such a list; "
            f"one is {str(value)[:200]!r}: rename the column if it is none of tools"
        )
    return tools


def _without_null(data: object) -> Any:  # noqa: ANN401 - plain data of any kind
    """Returns plain data without the keys that are null."""
    if isinstance(data, Mapping):
        return {key: _without_null(value) for key, value in data.items() if value is not None}
    return [_without_null(value) for value in data] if isinstance(data, list) else data


PROMPT_COLUMNS = (("prompt", "response"), ("prompt", "completion"))
"""Columns of prompts and what follows them."""
CHARACTERS = 2**18
"""How many characters of texts are encoded at once, if a text is not longer."""
ROWS_AT_ONCE = 10_000
"""How many rows are read at once."""
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a chat template says which part the model writes."""


@dataclass(frozen=True)
class Encoded:
    """A row as token ids, and for each of them whether a model learns to write it."""

    ids: list[int]
    learnt: list[bool]


def find_text_columns(rows: Rows, split: str, column: str) -> list[str]:
    """Finds the columns that hold the text of a split: `column`, or else chats, or else prompts and responses."""
    names = column_names(rows)
    for columns in ((column,), *((chats,) for chats in CHAT_COLUMNS), *PROMPT_COLUMNS):
        if set(columns) <= set(names):
            return list(columns)
    raise ValueError(
        f"the split '{split}' has no column '{column}'; it has {', '.join(names) or 'no rows'}, and neither chats "
        f"({' or '.join(CHAT_COLUMNS)}) nor 'prompt' and 'response'"
    )


def warn_of_empty_rows(rows: Rows, split: str, columns: Sequence[str]) -> None:
    """Warns if rows make no example, as they have null, or nothing but spaces to learn; rows of a stream are not counted."""
    import datasets
    import pyarrow.compute

    if not isinstance(rows, datasets.Dataset):
        return
    empty = 0
    for table in rows.select_columns(list(columns)).with_format("arrow").iter(ROWS_AT_ONCE):
        *prompts, learnt = (table[column] for column in columns)
        missing = [*(pyarrow.compute.is_null(column).to_pylist() for column in prompts), _is_empty(learnt)]
        empty += sum(any(row) for row in zip(*missing, strict=True))
    if empty:
        named = " or ".join(f"'{column}'" for column in columns)
        warnings.warn(
            f"data: {empty:,} of {len(rows):,} rows of the split '{split}' have no text in the column {named} and are left out",
            stacklevel=2,
        )


def _is_empty(column: "pyarrow.ChunkedArray") -> list[bool]:
    """Finds the values of a column that are null, without items or characters, or blank."""
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        empty = pyarrow.compute.equal(pyarrow.compute.list_value_length(column), 0)
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        blank = pyarrow.compute.utf8_is_space(column)
        empty = pyarrow.compute.or_(blank, pyarrow.compute.equal(pyarrow.compute.binary_length(column), 0))
    else:
        empty = pyarrow.compute.is_null(column)
    values: list[bool] = pyarrow.compute.fill_null(empty, True).to_pylist()
    return values


def is_text(rows: Rows, columns: Sequence[str]) -> bool:
    """Tells whether rows are plain text, of which all is learnt; reads the first row of a stream that does not know."""
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
    """Encodes rows: text, chats (lists of messages), or prompts with responses, which are chats if the tokenizer has a template.

    Args:
        rows: Columns of rows, as `datasets` gives them to a function that maps batches; null and blank rows do not count. A
            column `tools` says which tools the assistant of each chat may call.
        tokenizer: The tokenizer; of chats, its chat template decides what is written.
        columns: The column of text or chats, or those of prompts and responses.
        documents: Whether a text is a document, which the end token ends; else all are one, the lines of a file.
        responses: Whether responses alone are learnt; of text, all is.

    Raises:
        ValueError: If a row holds something else, or responses cannot be found in what the chat template makes of a chat.
    """
    tools = rows.get(TOOLS_COLUMN) or [None] * len(rows[columns[0]])
    every = zip(*(rows[column] for column in columns), tools, strict=True)
    full = [row for row in every if all(value is not None for value in row[:-1])]
    if len(columns) > 1:
        for prompt, response, row_tools in full:
            yield from _answered((prompt, response), row_tools, tokenizer, columns, responses)
    elif full and isinstance(full[0][0], list):
        for messages, row_tools in full:
            if chat := parse_chat(messages, columns[0]):
                yield _chat(chat, parse_tools(row_tools), tokenizer, responses)
    else:
        yield from _texts([text for text, _ in full], tokenizer, columns[0], documents)


def _texts(texts: list[Any], tokenizer: PreTrainedTokenizerBase, column: str, documents: bool) -> Iterator[Encoded]:
    check_texts(texts, column)
    end, some, size = _end(tokenizer) if documents else [], list[str](), 0
    texts = [text for text in (texts if documents else ["".join(texts)]) if text and not text.isspace()]
    for number, text in enumerate(texts, 1):
        some.append(text)
        size += len(text)
        # a few at once: a tokenizer holds more than a hundred bytes for each character meanwhile
        if number == len(texts) or size + len(texts[number]) > CHARACTERS:
            for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                yield Encoded([*ids, *end], [True] * (len(ids) + len(end)))
            some, size = [], 0


def check_texts(values: Sequence[Any], column: str) -> None:
    """Refuses a column that holds anything but text."""
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"the column '{column}' must hold text in every row; it holds {value!r}")


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token that ends a document, if there is one."""
    last: int | None = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return [] if last is None else [last]


def _answered(
    row: Sequence[Any], tools: object, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], responses: bool
) -> Iterator[Encoded]:
    """Encodes a prompt and its response: by the chat template, or one after the other where there is none."""
    chat, (prompt, response) = Chat(), row
    for value, column, role in zip(row, columns, ("user", "assistant"), strict=True):
        if not isinstance(value, list):
            check_texts([value], column)
        chat += parse_chat(value, column) if isinstance(value, list) else [{"role": role, "content": value}]
    if isinstance(response, str) and (not response or response.isspace()):
        return
    if tokenizer.chat_template or isinstance(prompt, list) or isinstance(response, list):
        yield _chat(chat, parse_tools(tools), tokenizer, responses)
        return
    encoded = _spans(prompt + response, [(len(prompt), len(prompt + response))], tokenizer, responses)
    end = _end(tokenizer)
    yield Encoded(encoded.ids + end, encoded.learnt + [True] * len(end))


def _chat(chat: Chat, tools: Tools | None, tokenizer: PreTrainedTokenizerBase, responses: bool) -> Encoded:
    """Encodes a chat; what is learnt is what the template marks as generated, or what each response adds to it."""
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: it has no chat template, which rows of messages need: name a tokenizer that has one")
    if not responses:
        return _spans(_written(chat, tools, tokenizer), [], tokenizer, responses)
    if not GENERATION_TAG.search(tokenizer.get_chat_template(tools=tools)):
        return _spans(*_responses(chat, tools, tokenizer), tokenizer, responses)
    _written(chat, tools, tokenizer)  # which refuses in our words what the template refuses
    encoded: Any = tokenizer.apply_chat_template(chat, tools, return_dict=True, return_assistant_tokens_mask=True)  # type: ignore[arg-type]
    return Encoded(list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]])


def _written(chat: Chat, tools: Tools | None, tokenizer: PreTrainedTokenizerBase, opened: bool = False) -> str:
    """Writes a chat by the template, perhaps up to where a response begins."""
    try:
        return str(tokenizer.apply_chat_template(chat, tools, tokenize=False, add_generation_prompt=opened))  # type: ignore[arg-type]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a chat: {error}; the chat is {str(chat)[:200]}") from error


def _responses(chat: Chat, tools: Tools | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """Returns a chat as text, with the characters of each response: from the text that asks for it, to the text with it."""
    text, spans = _written(chat, tools, tokenizer), list[tuple[int, int]]()
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _written(chat[:number], tools, tokenizer, opened=True) if number else None
        after = text if number == len(chat) - 1 else _written(chat[: number + 1], tools, tokenizer)
        if before is None or not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "loss_on='responses': the responses cannot be told apart from the rest, since the chat template writes "
                f"{'no chat that begins with one' if before is None else 'what comes before one otherwise once it is there'}: "
                "give the template {% generation %} tags, or learn from all (loss_on='all'); the chat is " + str(chat)[:200]
            )
        spans.append((len(before), len(after)))
    return text, spans


def _spans(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, responses: bool) -> Encoded:
    """Encodes text of which some characters are learnt: each token that has one of them, as transformers does."""
    if not responses:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Encoded(list(ids), [True] * len(ids))
    if not tokenizer.is_fast:
        raise ValueError(
            f"loss_on='responses': {type(tokenizer).__name__} does not say which characters a token is of, as a fast tokenizer "
            "does: name such a one, or learn from all (loss_on='all')"
        )
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = [any(start < last and end > first for first, last in spans) for start, end in encoded["offset_mapping"]]
    return Encoded(list(encoded["input_ids"]), learnt)
