"""Runs llama.cpp's converter for each request: `{"folder", "out", "dtype", "vocabulary", "factors"}`."""

import json
import logging
import sys
import traceback
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch


def main(path: Path) -> None:
    """Answers requests until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # the converter's output must not mix with answers
    sys.path[:0] = [str(path.parent / "gguf-py"), str(path.parent)]
    converter = import_module(path.stem)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = convert(converter, **request)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


def convert(
    converter: Any,  # noqa: ANN401 - a module
    folder: str,
    out: str,
    dtype: str,
    vocabulary: bool,
    factors: list[float] | None,
) -> dict[str, Any]:
    """Converts a folder with or without its vocabulary; returns an added text splitting."""
    errors = _Errors()
    logging.getLogger("hf-to-gguf").addHandler(errors)
    text_model = sys.modules["conversion.base"].TextModel
    added: dict[str, Any] = {}
    sys.argv = [converter.__file__, folder, "--outfile", out, "--outtype", dtype]
    with ExitStack() as stack:
        if factors or not vocabulary:
            hparams = converter.ModelBase.load_hparams(Path(folder), False)
            kind = converter.get_model_class(converter.get_model_architecture(hparams, converter.ModelType.TEXT))
            if not vocabulary:
                stack.enter_context(patch.object(kind, "set_vocab", _no_vocabulary))
            if factors:
                extended = _with_factors(kind.generate_extra_tensors, factors)
                stack.enter_context(patch.object(kind, "generate_extra_tensors", extended))
        stack.enter_context(patch.object(text_model, "get_vocab_base_pre", _split(text_model.get_vocab_base_pre, added)))
        try:
            converter.main()
        except SystemExit as error:
            if error.code:
                raise RuntimeError(errors.last or f"exit status {error.code}") from error
    return added


def _no_vocabulary(self: Any) -> None:  # noqa: ANN401 - a model of the converter
    """Writes the number of tokens, without the tokens."""
    self._set_vocab_none()
    key = f"{self.gguf_writer.arch}.vocab_size"
    if not any(key in part for part in self.gguf_writer.kv_data):
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


def _with_factors(known: Any, factors: list[float]) -> Any:  # noqa: ANN401 - a method of the converter
    """Adds divisors of rotary frequencies if the converter writes none."""

    def tensors(self: Any) -> list[tuple[str, torch.Tensor]]:  # noqa: ANN401
        if written := list(known(self)):
            return written  # Phi-3's, for short and long texts
        self.rope_parameters["rope_type"] = "default"  # for longrope, llama.cpp would not load this tensor
        return [("rope_freqs.weight", torch.tensor(factors, dtype=torch.float32))]

    return tensors


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_OTHERS}": "llama-bpe", rf"{_CONTRACTIONS}\p{{N}}{_OTHERS}": "qwen2"}
"""llama.cpp's names of text splitting, by the expression of the tokenizer: Llama 3's and Qwen2's."""


def _split_of(state: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name of a tokenizer's text splitting; None if it has none."""
    splitting = state.get("pre_tokenizer") or {}
    parts = splitting.get("pretokenizers", [splitting])
    *first, last = [part.get("type") for part in parts]
    expression = parts[0].get("pattern", {}).get("Regex")
    if last == "ByteLevel" and first == ["Split"] and not parts[-1].get("use_regex") and expression in SPLITS:
        return SPLITS[expression]
    if state.get("normalizer") or last != "ByteLevel" or not parts[-1].get("use_regex"):
        return None
    if first == ["Digits"] and parts[0].get("individual_digits"):
        return "smollm"
    return None if first else "gpt-2"


def _split(known: Any, added: dict[str, Any]) -> Any:  # noqa: ANN401 - a method of the converter
    """Identifies text splitting by rules where the converter does not know the vocabulary."""

    def pre(self: Any, tokenizer: Any) -> Any:  # noqa: ANN401
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if (split := _split_of(json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8")))) is None:
                raise
            added["split"] = split
            return split

    return pre


class _Errors(logging.Handler):
    """Stores the last logged error of the converter."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.last = record.getMessage()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
