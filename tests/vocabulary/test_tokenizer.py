"""Tokenizers with fewer tokens: what still encodes, what encodes as before, and what stays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from billhook.vocabulary.tokenizer import Vocabulary
from kit.small_tokenizers import CHAT, IN_BYTES, KINDS, LINES, SPECIAL, TEXTS, byte_level, like_llama3, word_level


def ids_of(tokenizer, text, special=False):
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def counted(tokenizer, texts=LINES[:1]):
    counts = np.zeros(Vocabulary(tokenizer).size)
    for text in texts:
        np.add.at(counts, ids_of(tokenizer, text), 1)
    return counts, np.flatnonzero(counts)


def trimmed(tokenizer, share, texts=LINES[:1]):
    """The tokenizer without a share of what may go, and the ids that are left."""
    vocabulary = Vocabulary(tokenizer)
    required, others = vocabulary.order(*counted(tokenizer, texts))
    assert sorted(required + others) == list(range(vocabulary.size))
    kept = np.sort(np.array(required + others[: round(len(others) * (1 - share))]))
    return vocabulary.without(kept), kept


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_what_remains_is_encoded_as_before_and_all_text_as_some_text(kind, share):
    name, tokenizer = kind
    fewer, kept = trimmed(tokenizer, share)
    old, exact = set(kept.tolist()), 0
    assert len(fewer) == len(kept)
    texts = [*TEXTS, *" ".join(TEXTS).split()]
    for text in texts:
        before, after = ids_of(tokenizer, text, special=True), ids_of(fewer, text, special=True)
        assert fewer.decode(after) == tokenizer.decode(before)
        if name in IN_BYTES:
            assert fewer.unk_token_id not in after or tokenizer.unk_token_id in before
        if set(before) <= old:
            exact += 1
            assert kept[after].tolist() == before
    assert exact == len(texts) if share == 0 else exact > 0


@pytest.mark.parametrize("name", IN_BYTES)
def test_any_text_is_encoded_and_decoded_to_itself(name):
    tokenizer = KINDS[name]()
    fewer, _ = trimmed(tokenizer, 1.0)

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text):
        ids = ids_of(fewer, text)
        assert fewer.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids_of(tokenizer, text))
        if name != "metaspace":  # which drops a space at the start, as before
            assert fewer.decode(ids, clean_up_tokenization_spaces=False) == text

    check()


def test_what_must_stay(kind):
    name, tokenizer = kind
    vocabulary = Vocabulary(tokenizer)
    required, _ = vocabulary.order(*counted(tokenizer), named=[vocabulary.size - 1])
    tokens = set(tokenizer.convert_ids_to_tokens(required))
    assert {*SPECIAL, tokenizer.convert_ids_to_tokens(vocabulary.size - 1)} <= tokens
    assert tokenizer.chat_template is None or set(ids_of(tokenizer, "user assistant system:")) & set(required)
    letters = {text for text in (token.strip("▁#") for token in tokenizer.get_vocab()) if len(text) == 1}
    if name in ("unigram", "WordPiece"):  # what they lack is unknown
        assert letters <= {token.strip("▁#") for token in tokens}
    elif name == "metaspace":
        assert "т" in letters
        assert not {"т", "я"} & tokens  # a script that the text does not use, and bytes spell
        assert {"q", "z", "é", ":", "1"} <= tokens
        with_cyrillic, _ = vocabulary.order(*counted(tokenizer, LINES[3:4]))
        assert {"т", "я"} <= set(tokenizer.convert_ids_to_tokens(with_cyrillic))


def test_a_token_outranks_what_is_made_of_it():
    for tokenizer in (byte_level(), like_llama3()):
        counts = np.zeros(Vocabulary(tokenizer).size)
        word = tokenizer.convert_tokens_to_ids("Ġquick")
        counts[word] = 1
        _, others = Vocabulary(tokenizer).order(counts, np.flatnonzero(counts))
        place = others.index(word)
        assert 1 <= place < 8  # after its parts, before all that is unused
        assert all(tokenizer.convert_ids_to_tokens(part) in "Ġquick" for part in others[:place])
        for share in np.linspace(0.05, 0.95, 10):  # any number of tokens is a tokenizer
            fewer, kept = trimmed(tokenizer, share)
            for token in kept.tolist():
                text = tokenizer.decode([token])
                if ids_of(tokenizer, text) == [token]:
                    assert kept[ids_of(fewer, text)].tolist() == [token]
            assert len(kept) == len(fewer)


def test_it_loads_as_any_other_and_keeps_chat_template_and_roles(tmp_path):
    fewer, _ = trimmed(byte_level(special_last=True), 0.8)
    fewer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == fewer.get_vocab()
    assert again.chat_template == CHAT
    assert (again.bos_token, again.pad_token_id) == ("<s>", fewer.convert_tokens_to_ids("<pad>"))
    chat = [{"role": "user", "content": "the quick fox"}]
    assert again.decode(again.apply_chat_template(chat)["input_ids"]) == "<s>user: the quick fox</s>"
    assert again("fox")["input_ids"][0] == again.bos_token_id


def test_those_that_cannot_lose_tokens_are_refused():
    from transformers import CTRLTokenizer  # a few are still written in Python

    class Written(CTRLTokenizer):
        def __init__(self):
            self.encoder = {}

        is_fast = False

    with pytest.raises(ValueError, match="is a WordLevel model, which spells no text in other tokens"):
        Vocabulary(word_level())
    with pytest.raises(ValueError, match="Written is written in Python"):
        Vocabulary(Written())
    with pytest.raises(ValueError, match="it has ids up to 399, but the model only 64 tokens"):
        Vocabulary(byte_level()).check_within(64)
