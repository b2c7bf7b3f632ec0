"""Chats in ShareGPT's form, and tools, against text that is written here without the template."""

import json

import datasets
import pytest

from billhook.calibration.conversations import ROLES, encode, parse_chat, parse_tools
from billhook.calibration.examples import IGNORE_INDEX, encode_separately, map_rows
from kit.chats import PLAIN, TAGGED, talking

END = "<|endoftext|>"
SPOKEN = [
    ("system", "Be brief."),
    ("human", "Who was it?"),
    ("gpt", "The cook."),
    ("human", "Why?"),
    ("gpt", "Nobody knows."),
]
SHARED = [{"from": who, "value": said} for who, said in SPOKEN]
NAMES = {"system": "system", "human": "user", "gpt": "assistant"}
TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": {"zone": {"type": "string"}}}},
    {"type": "function", "function": {"name": "ask", "description": "Asks him."}},
]
CALLING = "{% if tools %}[tools]\n{{ tools | tojson }}\n{% endif %}"


def written(spoken, tools=None, template=PLAIN):
    """What the templates make of a chat; the newline after a tag is none."""
    head = "" if tools is None else f"[tools]\n{json.dumps(tools)}\n"
    after = "\n" * (template is PLAIN)
    return head + "".join(f"[{NAMES[who]}]\n{said}{END}{after}" for who, said in spoken)


def decoded(rows, tokenizer, columns=("conversations",), responses=False):
    (encoded,) = encode(rows, tokenizer, columns, True, responses)
    return tokenizer.decode(encoded.ids), [token for token, own in zip(encoded.ids, encoded.learned, strict=True) if own]


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_the_form_of_sharegpt(template):
    tokenizer = talking(template)
    text, learnt = decoded({"conversations": [SHARED]}, tokenizer, responses=True)
    assert text == written(SPOKEN, template=template)
    end = "\n" * (template is PLAIN)
    assert tokenizer.decode(learnt) == f"The cook.{END}{end}Nobody knows.{END}{end}"


def test_it_is_read_from_data_as_messages_are():
    how = {"length": 200, "columns": ["conversations"], "documents": True, "responses": True}
    filled = [SHARED, [{"from": "human", "value": "Who?", "weight": 0}, {"from": "gpt", "value": "He."}]]
    rows = map_rows(datasets.Dataset.from_dict({"conversations": filled}), encode_separately, "train", talking(), **how)
    assert talking().decode(rows[0]["input_ids"]) == written(SPOKEN)
    assert talking().decode(rows[1]["input_ids"]) == written([("human", "Who?"), ("gpt", "He.")])
    assert talking().decode([one for one in rows[1]["labels"] if one != IGNORE_INDEX]) == f"He.{END}\n"


def test_those_who_are_unknown_are_refused():
    with pytest.raises(ValueError, match=f"the column 'x': from='narrator' must be one of {', '.join(ROLES)}"):
        parse_chat([*SHARED, {"from": "narrator", "value": "Night."}], "x")
    assert parse_chat([{"from": who, "value": ""} for who in ROLES], "x") == [
        {"role": own, "content": ""} for own in ROLES.values()
    ]


@pytest.mark.parametrize(
    "message", ["Who?", {}, {"from": "human"}, {"value": "Who?"}, {"from": 3, "value": "Who?"}, {"from": "human", "value": None}]
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(ValueError, match="the column 'x' must hold chats: .*'role' and 'content', or with 'from' and 'value'"):
        parse_chat([message], "x")


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
@pytest.mark.parametrize("form", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template(template, form):
    tokenizer = talking(CALLING + template)
    made = [{"conversations": [SHARED] * 2, "tools": own} for own in ([form, form], [form, None])]
    one, other = map(datasets.Dataset.from_dict, made)
    for rows, second in ((one, TOOLS), (other, None)):
        assert decoded(rows[:1], tokenizer)[0] == written(SPOKEN, TOOLS, template), "without the keys that datasets fills in"
        assert decoded(rows[1:], tokenizer)[0] == written(SPOKEN, second, template)
    _, learnt = decoded(one[:1], tokenizer, responses=True)
    assert learnt == decoded({"conversations": [SHARED]}, tokenizer, responses=True)[1]


def test_tools_of_prompts_and_of_a_template_of_their_own():
    tokenizer = talking({"default": PLAIN, "tool_use": CALLING + PLAIN})
    rows = {"prompt": ["Who was it?"], "response": ["The cook."]}
    pair = [("human", "Who was it?"), ("gpt", "The cook.")]
    assert decoded(rows | {"tools": [TOOLS]}, tokenizer, ("prompt", "response"), True)[0] == written(pair, TOOLS)
    assert decoded(rows | {"tools": [[]]}, tokenizer, ("prompt", "response"), True)[0] == written(pair)
    bare = talking(None)
    assert decoded(rows | {"tools": ["a hammer"]}, bare, ("prompt", "response"))[0] == f"Who was it?The cook.{END}"
    assert decoded({"text": ["A hammer."], "tools": ["a hammer"]}, tokenizer, ("text",))[0] == f"A hammer.{END}"


@pytest.mark.parametrize("tools", ["a hammer", '{"name": "now"}', "3", 3, {"name": "now"}, ["now"], [[]]])
def test_what_is_no_list_of_tools_is_refused(tools):
    with pytest.raises(ValueError, match="the column 'tools' must hold lists of tools, .* Rename the column"):
        parse_tools(tools)


@pytest.mark.parametrize("tools", [None, [], "", " ", "null", "[]"])
def test_there_may_be_no_tools(tools):
    assert parse_tools(tools) is None
