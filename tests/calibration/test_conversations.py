"""Rows to token ids, and which of them are learnt."""

import datasets
import pytest
from transformers import AutoTokenizer

from billhook.assets import model_path
from billhook.calibration.conversations import encode, find_text_columns, is_text
from billhook.calibration.examples import IGNORE_INDEX, collate_packed, encode_separately, map_rows, pack
from kit.chats import PLAIN, TAGGED, chat, talking

TURNS = chat("Who was it?", "The old gardener.", "And why?", "Nobody knows, they say.")
END = "<|endoftext|>"


def one(rows, tokenizer, columns=("messages",), responses=True):
    (encoded,) = encode(rows, tokenizer, columns, True, responses)
    assert len(encoded.ids) == len(encoded.learned)
    return encoded


def learnt(encoded, tokenizer):
    return tokenizer.decode([token for token, own in zip(encoded.ids, encoded.learned, strict=True) if own])


@pytest.mark.parametrize(("template", "after"), [(PLAIN, "\n"), (TAGGED, "")])
def test_responses_alone_are_learnt_of_a_chat(template, after):
    tokenizer = talking(template)
    encoded = one({"messages": [TURNS]}, tokenizer)
    assert learnt(encoded, tokenizer) == f"The old gardener.{END}{after}Nobody knows, they say.{END}{after}"
    assert encoded.ids == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert all(one({"messages": [TURNS]}, tokenizer, responses=False).learned)


def test_a_chat_that_ends_with_a_question():
    tokenizer = talking()
    assert learnt(one({"messages": [TURNS[:3]]}, tokenizer), tokenizer) == f"The old gardener.{END}\n"
    assert not any(one({"messages": [TURNS[:1]]}, tokenizer).learned)


@pytest.mark.parametrize("response", ["response", "completion"])
def test_a_prompt_and_its_response_are_a_chat(response):
    tokenizer, rows = talking(), {"prompt": ["Who was it?"], response: ["The old gardener."]}
    assert one(rows, tokenizer, ["prompt", response]) == one({"messages": [TURNS[:2]]}, tokenizer)
    rows = {"prompt": [TURNS[:1]], response: [TURNS[1:2]]}
    assert one(rows, tokenizer, ["prompt", response]) == one({"messages": [TURNS[:2]]}, tokenizer)


def test_without_a_template_a_response_follows_its_prompt():
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    encoded = one({"prompt": ["Who was it?"], "response": [" The old gardener."]}, tokenizer, ["prompt", "response"])
    assert tokenizer.decode(encoded.ids) == f"Who was it? The old gardener.{END}"
    assert learnt(encoded, tokenizer) == f" The old gardener.{END}"


def test_null_and_blank_rows_do_not_count():
    tokenizer = talking()
    assert not list(encode({"messages": [None, []]}, tokenizer, ["messages"], True, True))
    rows = {"prompt": ["Who?", None, "Who?", "Who?"], "response": [None, "He.", " ", "He."]}
    assert len(list(encode(rows, tokenizer, ["prompt", "response"], True, True))) == 1


def test_keys_that_are_filled_in_do_not_reach_the_template():
    tokenizer = talking("{% for m in messages %}{{ m.keys() | list }}{% endfor %}")
    filled = [message | {"tool_calls": None} for message in TURNS]
    encoded = one({"messages": [filled]}, tokenizer, responses=False)
    assert "tool_calls" not in tokenizer.decode(encoded.ids)


FORGETFUL = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            FORGETFUL,
            TURNS,
            "loss_on='responses': the chat template does not separate responses .a response changes the text before it",
        ),
        (PLAIN, TURNS[1:], "a chat starts with a response"),
        ("{{ raise_exception('roles must alternate') }}", TURNS, "the chat template rejects a chat .roles must alternate"),
        (None, TURNS, "tokenizer: chats need a chat template, and the tokenizer has none"),
        (PLAIN, [{"speaker": "human", "value": "Who?"}], "the column 'messages' must hold chats: .* Got the message {'speaker'"),
        (PLAIN, ["Who?"], "the column 'messages' must hold chats"),
    ],
)
def test_chats_that_are_refused(template, messages, message):
    with pytest.raises(ValueError, match=message):
        one({"messages": [messages]}, talking(template))


def test_a_prompt_that_is_no_text():
    with pytest.raises(ValueError, match="the column 'response' must hold text in every row. Got 5"):
        one({"prompt": ["Who?"], "response": [5]}, talking(), ["prompt", "response"])


def test_a_tokenizer_that_does_not_know_characters(monkeypatch):
    tokenizer = talking()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="loss_on='responses' needs the characters of each token, which .*loss_on='all'"):
        one({"messages": [TURNS]}, tokenizer)
    assert all(one({"messages": [TURNS]}, tokenizer, responses=False).learned)


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
@pytest.mark.parametrize("length", [2, 5, 16, 33])
def test_packing_keeps_labels_with_their_tokens(template, length):
    tokenizer = talking(template)
    chats = [chat(f"Question {n}?", f"Answer {n}, of {'some ' * n}words.") for n in range(9)]
    rows = list(encode({"messages": chats}, tokenizer, ["messages"], True, True))
    ids, marks = ([value for row in rows for value in getattr(row, name)] for name in ("ids", "learned"))
    labels = [token if own else IGNORE_INDEX for token, own in zip(ids, marks, strict=True)]
    starts = range(0, len(ids) - length + 1, length)
    expected = [(ids[i : i + length], labels[i : i + length]) for i in starts if any(marks[i + 1 : i + length])]
    packed = pack({"messages": chats}, tokenizer, length, ["messages"], True, True)
    assert list(zip(packed["input_ids"], packed["labels"], strict=True)) == expected
    assert length > 5 or len(expected) < len(starts), "the test needs a block with nothing to learn"


def test_rows_apart_are_cut_and_those_without_a_response_in_reach_left_out():
    tokenizer, short, long = talking(), chat("Who?", "He."), chat("Who " * 50 + "?", "He.")
    whole = one({"messages": [short]}, tokenizer)
    made = encode_separately({"messages": [long, short]}, tokenizer, 30, ["messages"], True, True)
    assert made["input_ids"] == [whole.ids]
    assert made["labels"] == [[token if own else IGNORE_INDEX for token, own in zip(whole.ids, whole.learned, strict=True)]]
    assert [len(ids) for ids in encode_separately({"messages": [long]}, tokenizer, 30, ["messages"], True)["input_ids"]] == [30]


def test_another_template_is_another_cache_entry():
    rows = datasets.Dataset.from_dict({"messages": [TURNS]})
    how = {"length": 4, "columns": ["messages"], "documents": True, "responses": True}
    one, other = (map_rows(rows, pack, "train", talking(template), **how) for template in (PLAIN, TAGGED))
    assert one._fingerprint != other._fingerprint
    assert one["labels"][:] != other["labels"][:]


def test_which_columns_are_read():
    def found(*columns, column="text"):
        return find_text_columns(datasets.Dataset.from_dict({name: ["x"] for name in columns}), "train", column)

    assert found("messages", "text") == ["text"]
    assert found("messages", "text", column="messages") == ["messages"]
    assert found("prompt", "response", "messages") == ["messages"]
    assert found("prompt", "completion", "response") == ["prompt", "response"]
    assert found("prompt", "completion") == ["prompt", "completion"]
    assert found("prompt", "response", "conversations") == ["conversations"]
    assert found("conversations", "messages") == ["messages"]
    said = r"no column 'text', no chats \(messages or conversations\), and no 'prompt' and 'response'. It has prompt, a"
    with pytest.raises(ValueError, match=said):
        found("prompt", "a")


def test_which_rows_are_plain_text():
    text, chats = (datasets.Dataset.from_dict({"x": [own]}) for own in ("a", TURNS))
    for rows, plain in ((text, True), (chats, False)):
        assert is_text(rows, ["x"]) is plain
        assert is_text(datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows)), ["x"]) is plain
    assert not is_text(text, ["prompt", "response"])


def test_labels_of_a_batch_are_those_of_its_blocks_or_else_all_tokens():
    batch = collate_packed([{"input_ids": [1, 2], "labels": [IGNORE_INDEX, 2]}, {"input_ids": [3, 4], "labels": None}])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2], [3, 4]]
