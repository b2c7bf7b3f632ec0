"""Tokenizers with fewer tokens.

No token is added, and those that remain keep their order. A text whose tokens all remain is encoded as before: byte-pair encoding
(https://arxiv.org/abs/1508.07909) makes a token by merging the same parts, which remain with it; a unigram model
(https://arxiv.org/abs/1804.10959) prefers the same of fewer segmentations; WordPiece takes the same longest match.
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from billhook.linalg import Indices
from billhook.model import TRIMMED, vocabulary_fingerprint

MODELS = ("BPE", "Unigram", "WordPiece")
"""Kinds of tokenizers that can lose tokens."""
UNREADABLE = "\ufffd"
"""What the decoder makes of a part of a character's bytes."""
FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
CHAT = ({"role": "system", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})


class Vocabulary:
    """The tokens of a tokenizer, and their parts.

    Args:
        tokenizer: A fast tokenizer: byte-pair encoding, a unigram model, or WordPiece.

    Raises:
        ValueError: If it is another tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kind = type(tokenizer).__name__
        if not tokenizer.is_fast or backend is None:
            raise ValueError(f"tokenizer: {kind} is written in Python, so its tokens cannot be removed. Use a fast tokenizer.")
        self.tokenizer = tokenizer
        self._backend = backend
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = self._spec["model"]
        if self._model["type"] not in MODELS:
            raise ValueError(
                f"tokenizer: {kind} is a {self._model['type']} model, which spells no text in other tokens. Legal are "
                f"{', '.join(MODELS)}."
            )
        vocab = self._model["vocab"]
        self.ids: dict[str, int] = vocab if isinstance(vocab, dict) else {token: n for n, (token, _) in enumerate(vocab)}
        self.added: dict[str, int] = {added["content"]: added["id"] for added in self._spec["added_tokens"]}

    @property
    def size(self) -> int:
        """The largest id, plus 1."""
        return max(*self.ids.values(), *self.added.values(), -1) + 1

    def check_within(self, size: int) -> None:
        """Raises if a token has no row in a vocabulary of this size."""
        if self.size > size:
            raise ValueError(f"tokenizer: it has ids up to {self.size - 1:,}, but the model only {size:,} tokens.")

    def order(self, scores: Indices, used: Indices, named: Collection[int] = ()) -> tuple[list[int], list[int]]:
        """Returns the ids that stay, and all others, the highest score first.

        The parts of a token come before it. These stay: added and special tokens, those of the chat template, bytes, and single
        characters; letters only of scripts that are used, if others can be spelled in bytes. Tokens of equal score are ordered by
        id, which is by frequency in most tokenizers, and ids without a token are last.

        Args:
            scores: How much each id is worth: float64, `[tokens]`.
            used: The ids in the text.
            named: Ids that must stay for another reason.
        """
        used_texts = (self._texts.get(number, "") for number in used)
        scripts = {_script(character) for text in used_texts for character in text if character.isalpha()}
        placed = {*named, *self.added.values(), *self._special, *self._spelling(scripts)}
        others = []
        for prompt in (True, False) if getattr(self.tokenizer, "chat_template", None) else ():
            for messages in (CHAT, CHAT[1:]):  # some templates have no system message
                try:
                    text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
                except Exception:  # noqa: S112 - whatever a template raises
                    continue
                placed.update(self._backend.encode(text, add_special_tokens=False).ids)
                break
        waiting = list(placed)
        while waiting:  # with what they are made of
            parts = set(self._parts.get(waiting.pop(), ())) - placed
            placed |= parts
            waiting += parts
        required = sorted(placed)
        tokens = {*self.ids.values(), *self.added.values()}
        ranked = np.argsort(-np.where(np.isin(np.arange(len(scores)), list(tokens)), scores, -1), kind="stable")
        for token in ranked.tolist():
            waiting = [token]
            while waiting:
                missing = [part for part in self._parts.get(waiting[-1], ()) if part not in placed]
                if missing and waiting[-1] not in placed:
                    waiting += missing
                    continue
                if (last := waiting.pop()) not in placed:
                    placed.add(last)
                    others.append(last)
        return required, others

    def without(self, kept: Indices) -> PreTrainedTokenizerBase:
        """Returns a tokenizer with only these ids, ascending, which get numbers from 0.

        It is loaded as a user would load it. Raises a ValueError if text could not be encoded, or would be encoded otherwise,
        although all of its tokens remain.
        """
        new = {int(old): number for number, old in enumerate(kept)}
        needed = dict.fromkeys(self._spelling(set()), "it spells text") | dict.fromkeys(self._special, "it is a special token")
        for number in new:
            text = repr(self.tokenizer.convert_ids_to_tokens(number))
            needed |= dict.fromkeys(self._parts.get(number, ()), f"{text} is made of it")
        for number, why in needed.items():
            if number not in new:
                name = self.tokenizer.convert_ids_to_tokens(number)
                raise ValueError(f"tokens: {number} ({name!r}) must stay, because {why}. Let bh.plan(tokens=) choose tokens.")
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            self._write(Path(folder), new)
            trimmed = AutoTokenizer.from_pretrained(folder)
        for token, number in {**self.ids, **self.added}.items():
            if number in new and trimmed.convert_tokens_to_ids(token) != new[number]:
                raise ValueError(
                    f"tokenizer: {type(trimmed).__name__} numbers its tokens by itself ({token!r} would be "
                    f"{trimmed.convert_tokens_to_ids(token)}, not {new[number]}), so none can be removed."
                )
        trimmed.name_or_path = self.tokenizer.name_or_path
        return trimmed

    def _write(self, folder: Path, new: Mapping[int, int]) -> None:
        """Rewrites a saved tokenizer for the new ids."""
        spec = json.loads((folder / FILE).read_text(encoding="utf-8"))
        model = spec["model"]
        if model["type"] == "Unigram":
            unknown = model["unk_id"]
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
            model["unk_id"] = None if unknown is None else new[unknown]
        else:
            model["vocab"] = {token: new[number] for token, number in model["vocab"].items() if number in new}
        if model["type"] == "BPE":
            kept = model["vocab"].keys()
            model["merges"] = [list(merge) for merge in self._merges if {*merge, self._merged(*merge)} <= kept]
        spec["added_tokens"] = [added | {"id": new[added["id"]]} for added in spec["added_tokens"] if added["id"] in new]
        for part in ("post_processor", "padding"):
            spec[part] = _with_numbers(spec[part], new.__getitem__)
        (folder / FILE).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config[TRIMMED] = vocabulary_fingerprint(np.array([*new]), self.tokenizer.init_kwargs.get(TRIMMED, 0))
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {str(new[int(old)]): added for old, added in decoder.items() if int(old) in new}
        (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")

    @property
    def _special(self) -> set[int]:
        """The ids of special tokens, of tokens added to a text, and of the unknown token."""
        special = set(self.tokenizer.all_special_ids)

        def collect(number: int) -> int:
            special.add(number)
            return number

        _with_numbers(self._spec["post_processor"], collect)
        if self._model["type"] == "Unigram" and self._model["unk_id"] is not None:
            special.add(self._model["unk_id"])
        if (unknown := self._model.get("unk_token")) is not None:
            special.add(self.ids.get(unknown, self.added.get(unknown, -1)))
        return special - {-1}

    def _spelling(self, scripts: Collection[str]) -> set[int]:
        """Returns the ids of bytes and characters; with bytes, letters of some scripts only."""
        spelling = {self.ids[byte] for byte in self._bytes if byte in self.ids}
        for number, text in self._texts.items():
            if len(text) == 1 and text != UNREADABLE and (not self._bytes or not text.isalpha() or _script(text) in scripts):
                spelling.add(number)
        return spelling

    @cached_property
    def _bytes(self) -> tuple[str, ...]:
        """The tokens of single bytes. Empty if the tokenizer spells nothing in bytes."""
        if "ByteLevel" in _types(self._spec["pre_tokenizer"]):
            return tuple(ByteLevel.alphabet())
        return tuple(f"<0x{byte:02X}>" for byte in range(256)) if self._model.get("byte_fallback") else ()

    @cached_property
    def _texts(self) -> dict[int, str]:
        """The text of each token, without the marks of a word's begin, middle, and end."""
        if "ByteLevel" in _types(self._spec["pre_tokenizer"]):
            decode = self._backend.decoder.decode
            return {number: decode([token]) for token, number in self.ids.items()}
        before = self._model.get("continuing_subword_prefix") or ""
        after = self._model.get("end_of_word_suffix") or ""
        return {number: token.removeprefix(before).removesuffix(after) for token, number in self.ids.items()}

    @cached_property
    def _parts(self) -> dict[int, list[int]]:
        """The tokens of which byte-pair encoding makes each token."""
        made_of = defaultdict(list)
        for merge in self._merges:
            made_of[self._merged(*merge)].append(merge)
        ranks = {merge: rank for rank, merge in enumerate(self._merges)}
        parts = {}
        for token, merges in made_of.items():
            if len(merges) > 1 and (last := self._last_merge(token, ranks)):
                merges = [last]  # otherwise any of them, in the middle of a word
            needed = [self.ids[part] for merge in merges for part in merge if part in self.ids]
            if token in self.ids:
                parts[self.ids[token]] = needed
        return parts

    @property
    def _merges(self) -> list[tuple[str, str]]:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._model.get("merges", ()))
        return [(first, second) for first, second in merges]  # older files join a merge by a space

    def _merged(self, first: str, second: str) -> str:
        return first + second.removeprefix(self._model.get("continuing_subword_prefix") or "")

    def _last_merge(self, token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
        """Returns the merge that makes a token of single characters; None if none does."""
        symbols = list(token)
        last = None
        while len(symbols) > 1:
            rank, last = min((ranks.get(pair, len(ranks)), pair) for pair in pairwise(symbols))
            if rank == len(ranks):
                return None
            position = 0
            while position < len(symbols) - 1:
                if (symbols[position], symbols[position + 1]) == last:
                    symbols[position : position + 2] = [self._merged(*last)]
                position += 1
        return last


def _types(part: Any) -> set[str]:  # noqa: ANN401 - a part of a tokenizer's file
    """Returns the types in a part of a tokenizer, at any depth."""
    if isinstance(part, list):
        return {kind for item in part for kind in _types(item)}
    return {part["type"], *_types(list(part.values()))} if isinstance(part, dict) and isinstance(part.get("type"), str) else set()


def _script(character: str) -> str:
    """Returns the first word of a character's name, which is its script.

    >>> _script("é"), _script("я")
    ('LATIN', 'CYRILLIC')
    """
    return unicodedata.name(character, "").partition(" ")[0]


def _with_numbers(part: Any, change: Callable[[int], int]) -> Any:  # noqa: ANN401 - a part of a tokenizer's file
    """Returns a post-processor or padding with changed `ids`, `[token, id]`, and `pad_id`."""
    if isinstance(part, list):
        return [_with_numbers(item, change) for item in part]
    if not isinstance(part, dict):
        return part
    changed = dict[str, Any]()
    for name, value in part.items():
        if name == "ids":
            changed[name] = [change(number) for number in value]
        elif name in ("sep", "cls") and isinstance(value, list):
            changed[name] = [value[0], change(value[1])]
        else:
            changed[name] = change(value) if name == "pad_id" else _with_numbers(value, change)
    return changed
