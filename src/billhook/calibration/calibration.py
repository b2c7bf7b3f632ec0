"""Calibration data: packed examples of several text sources."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from glob import has_magic
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_int, check_number, check_types
from billhook.calibration.conversations import find_text_columns, warn_of_empty_rows
from billhook.calibration.examples import map_rows, pack
from billhook.calibration.generated import GENERATED, can_generate, check_can_generate, example_length, generated
from billhook.calibration.reading import Table, check_data, is_line_text, is_table, load_splits
from billhook.engine import Batch, check_batches
from billhook.model import check_ids, check_tokenizer, find_transformer, load_tokenizer, tokenizer_of
from billhook.private_paths import without_folders
from billhook.progress import progress_bar

Source = str | dict[str, str | list[str]]
"""A source: `"generated"`, `"tiny"`, a file, a glob, a folder, a Hub name, or files by split."""
Sources: TypeAlias = Source | Table | Sequence[Source | Table]
"""One source or several; in Python also objects of `datasets`."""
MIXED = "mixed"
"""Name of the packaged text of eight kinds."""
UNSEEN = "unseen"
"""Name of the packaged text of two more kinds, which is only evaluated on."""
SHOWN = 4
"""Most files of a split that appear in the name of a source."""


def name_sources(sources: Sources, taken: Collection[str] = ()) -> dict[str, Source | Table]:
    """Returns the sources by name.

    A file is named after its stem, and an object after its data set, with a number if that name is taken.

    Args:
        sources: One source or several.
        taken: Names that no object may get.

    Raises:
        ValueError: If there is no source, one cannot be read or is a stream, or two have the same name.
    """
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    for source in listed:
        check_data(source, "sources")
        if not is_table(source):
            continue
        import datasets

        if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
            raise ValueError(
                f"sources: a stream ({type(source).__name__}) is not supported, because examples are drawn from all rows. Take a "
                "part of it, such as datasets.Dataset.from_list(list(stream.take(1000)))."
            )
        if isinstance(source, datasets.DatasetDict) and "train" not in source:
            splits = ", ".join(map(str, source)) or "none"
            raise ValueError(f"sources: the DatasetDict has the splits {splits}. Calibration needs 'train'.")
    by_name = dict[str, Source | Table]()
    for source in listed:
        if is_table(source):
            table = source
            info = (table["train"] if isinstance(table, Mapping) else table).info
            known = (info.dataset_name if info.dataset_name != info.builder_name else None) or "dataset"  # of files it is "json"
            numbered = chain([known], (f"{known} {number}" for number in count(2)))
            name = next(free for free in numbered if free not in {*by_name, *taken, GENERATED, MIXED, UNSEEN})
        else:
            name = _of_files(source)
        if name in (GENERATED, MIXED, UNSEEN) and source != name:
            raise ValueError(f"sources: '{source}' has the reserved name '{name}'. Rename the file.")
        if name in by_name or any(source is another for another in by_name.values()):
            raise ValueError(
                f"sources={sources!r}: '{name}' occurs twice. Name each source once, and rename files with equal names."
            )
        by_name[name] = source
    if not by_name:
        raise ValueError(f"sources={sources!r} is empty. Name at least one source.")
    return by_name


def _of_files(source: Source) -> str:
    """Returns the name of a source: of files by split that of `train`, of a glob the pattern."""
    if isinstance(source, dict):
        files = source.get("train") or next(iter(source.values()), "")
        names = [_of_files(file) for file in ([files] if isinstance(files, str) else files)]
        return " + ".join(names if len(names) <= SHOWN else [*names[: SHOWN - 1], f"{len(names) - SHOWN + 1} more"])
    return Path(source).stem if Path(source).suffix and not has_magic(source) else source


@dataclass(frozen=True)
class Calibration:
    """Calibration text: packed token sequences from files, datasets, or the model itself.

    A model that is pruned and repaired on one domain degrades on others. Use sources like the text that the model is for.

    Args:
        sources: One source or several: `"generated"` (self-generated text), `"mixed"` (packaged text of eight kinds), `"tiny"`
            (Shakespeare), a file (.txt, .jsonl, .csv, .parquet), a glob (`"chats/*.jsonl"`), a folder, a Hub name (`"name"` or
            `"name:config"`), or files by split; in Python also a `Dataset` or `DatasetDict`, named after its
            `info.dataset_name`, or `"dataset"`. Calibration uses the split `train`; `held_out` uses `test` or `validation`.
            Without the column `column`, examples are chats (column `messages` or `conversations`) or pairs (`prompt` and
            `response`); both go through the chat template, with the column `tools` if there is one.
        weights: Share of the tokens for each source, in the same order. Defaults to equal shares.
        tokens: Total number of tokens over all sources. A source that is shorter than its share is used in full.
        length: Tokens per example. Defaults to the context length of the model, at most 512.
        batch_size: Examples per batch, all from one source.
        column: Column that holds the text.
        tokenizer: Name or folder of a tokenizer. Defaults to the one in the folder of the model.
        seed: Seed for drawing examples and for self-generated text.

    Raises:
        ValueError: If there is no source, one is a stream or a `DatasetDict` without `train`, two have the same name, or a
            number is out of range. On reading, if a source is too short for one example, or the model cannot generate text.

    Example:
        >>> import billhook as bh
        >>> calibration = bh.Calibration(["generated", "notes.txt"], weights=[1, 3], tokens=4096, length=512)
        >>> calibration.examples(512)
        {'generated': 2, 'notes': 6}
    """

    sources: Sources = GENERATED
    weights: Sequence[float] | None = None
    tokens: int = 40 * 512
    length: int | None = None
    batch_size: int = 1
    column: str = "text"
    tokenizer: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(Calibration, vars(self))
        check_int("tokens", self.tokens)
        check_int("length", 2 if self.length is None else self.length, 2)
        check_int("batch_size", self.batch_size)
        sources = self.named
        weights = [1.0] * len(sources) if self.weights is None else self.weights
        for weight in weights:
            check_number("weights", weight, above=0)
        if len(weights) != len(sources):
            raise ValueError(f"weights={self.weights!r} must have one number for each of the {len(sources)} sources.")

    @property
    def named(self) -> dict[str, Source | Table]:
        """The sources by name; a file is named after its stem."""
        return name_sources(self.sources)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain data for records, with file names but no folders."""
        sources = [name if is_table(source) else source for name, source in self.named.items()]
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        public: dict[str, Any] = without_folders(
            {"sources": sources[0] if len(sources) == 1 else sources, "tokenizer": self.tokenizer}
        )
        return plain | public

    def examples(self, length: int) -> dict[str, int]:
        """Returns the number of examples of each source, which is never 0."""
        weights = [1.0] * len(self.named) if self.weights is None else self.weights
        shares = (self.tokens * weight / sum(weights) / length for weight in weights)
        return {name: max(round(share), 1) for name, share in zip(self.named, shares, strict=True)}

    def held_out(
        self, model: nn.Module, rows: int, tokenizer: PreTrainedTokenizerBase | None = None, folder: Path | None = None
    ) -> list[Batch]:
        """Reads held-out examples of each source.

        They come from the split `test`, or else `validation`, or else from examples that `read` does not return. Self-generated
        text uses another seed.

        Args:
            model: The model, whose tokenizer is the default.
            rows: Maximum number of examples of each source.
            tokenizer: Tokenizer to use instead.
            folder: Folder for self-generated text (see `read`).
        """
        return self._read(model, tokenizer, folder, rows)

    def read(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, folder: Path | None = None) -> list[Batch]:
        """Reads all sources, generating text where needed, and returns their batches in order.

        Args:
            model: The model, or a module that holds it.
            tokenizer: Tokenizer to use instead of `self.tokenizer`.
            folder: Folder for self-generated text, from which the same call continues if it is interrupted.
        """
        return self._read(model, tokenizer, folder)

    def _read(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path | None, held_out: int | None = None
    ) -> list[Batch]:
        subject = find_transformer(model)
        length = example_length(subject, self.length)
        batches = []
        for name, wanted in self.examples(length).items():
            if name == GENERATED:
                most = None if held_out is None else max(min(held_out, MEASURED // length), 1)  # as generating takes long
                examples, seed = (wanted, self.seed) if most is None else (most, self.seed + 1)
                batches += generated(
                    subject, examples=examples, length=length, batch_size=self.batch_size, seed=seed, folder=folder
                )
            else:
                tokenizer = tokenizer or tokenizer_of(subject, self.tokenizer)
                check_tokenizer(subject, tokenizer)
                with progress_bar(f"reading {'packaged text' if name in (MIXED, UNSEEN) else name}"):
                    tokens = self._text(name, wanted, held_out, length, tokenizer)
                check_ids(subject, tokens)
                batches += [Batch({"input_ids": ids}, name) for ids in torch.split(tokens, self.batch_size)]
        return batches

    def _text(self, name: str, count: int, held_out: int | None, length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Draws calibration examples, or held-out ones, from a source: `[examples, length]`."""
        splits = load_splits(self.named[name])
        if "train" not in splits:
            raise ValueError(f"sources: '{name}' has the splits {', '.join(splits)}. Calibration needs 'train'.")
        other = next((split for split in ("test", "validation") if split in splits and held_out is not None), None)
        split = other or "train"
        rows = splits[split]
        columns = find_text_columns(rows, split, self.column)
        documents = not is_line_text(rows)
        if documents:  # blank lines of a .txt file are part of its text
            warn_of_empty_rows(rows, split, columns)
        examples = map_rows(rows, pack, split, tokenizer, length=length, columns=columns, documents=documents)
        if other is not None:
            return torch.tensor(examples[:held_out]["input_ids"])
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = order[:count] if held_out is None else order[count : count + held_out]
        if not drawn and order:
            raise ValueError(
                f"sources: '{name}' has {len(order)} examples of {length} tokens, and calibration needs {count}, so none "
                "is left to hold out. Use fewer tokens, or a longer text."
            )
        if not drawn:
            raise ValueError(
                f"sources: '{name}' is too short for an example of length={length} tokens. Use a longer text or a smaller length."
            )
        return torch.tensor(examples[drawn]["input_ids"])


Batches = Iterable[Any] | Calibration
"""Batches of forward inputs, or a `Calibration` that reads them."""


def read_batches(batches: Batches | None, model: nn.Module) -> Iterable[Any]:
    """Returns the batches, or reads a `Calibration`, by default the one of commands.

    Raises:
        ValueError: If there are no batches, and default calibration data cannot be read.
    """
    if batches is None:
        try:
            check_can_generate(find_transformer(model))
        except ValueError as error:
            raise ValueError(f"batches=None: {str(error).removesuffix('.')}. Pass batches.") from error
        # packaged and self-generated text, only the latter without a tokenizer
        origin = str(find_transformer(model).config.name_or_path)
        tokenizer = None
        with suppress(ValueError, OSError):
            tokenizer = load_tokenizer(origin) if origin else None
        batches = Calibration()
        if tokenizer is not None:
            batches = Calibration([MIXED, GENERATED], tokens=2 * Calibration.tokens)
    return check_batches(batches.read(model) if isinstance(batches, Calibration) else batches)


SINGLE_SOURCE = (
    "Repair uses a single source of calibration data, so the model may degrade on other text. "
    'Use bh.Calibration([..., "mixed", "generated"]) to add packaged and self-generated text.'
)

ONLY_SELF_GENERATED = (
    "KV heads are pooled on self-generated text only, which represents other text poorly. "
    'Add text from your domain, such as bh.Calibration(["train.txt", "mixed"]).'
)


def log_single_source(model: nn.Module, sources: Collection[str]) -> None:
    """Logs once that a language model is fitted to a single source of one kind of text.

    A log line, not a warning: one source is right for a model that will read no other text.

    Args:
        model: The model.
        sources: Source names of all batches; empty if batches have none.
    """
    is_single = len({*sources}) == 1 and not {GENERATED, MIXED} & {*sources}
    if is_single and isinstance(model, PreTrainedModel) and can_generate(model):
        log_once(SINGLE_SOURCE)


def log_only_self_generated(sources: Collection[str]) -> None:
    """Logs once that KV heads are pooled on self-generated text only.

    Args:
        sources: Source names of all batches; empty if batches have none.
    """
    if set(sources) == {GENERATED}:
        log_once(ONLY_SELF_GENERATED)


@cache
def log_once(message: str) -> None:
    """Logs a message on the first rank, unless this process has logged it before."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0):
        logging.getLogger("billhook").warning(message)


MEASURED = 4096
"""Most self-generated tokens to evaluate on, next to other texts."""
OtherTexts: TypeAlias = Sources | None
"""Texts to evaluate on that are not calibrated on."""


def check_other_texts(calibration: Calibration, also: OtherTexts) -> None:
    """Raises if a text cannot be read, or has the name of another text."""
    for source in also if isinstance(also, Sequence) and not isinstance(also, str) else [also]:
        if source is not None:
            check_data(source, "also")
    if same := sorted(_others(calibration, also).keys() & {*calibration.named, GENERATED}):
        raise ValueError(f"also: '{same[0]}' is the name of another text, so their results would be mixed. Rename the file.")


def evaluation_batches(
    calibration: Calibration,
    model: PreTrainedModel,
    rows: int,
    also: OtherTexts = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generated: bool = True,
    folder: Path | None = None,
) -> list[Batch]:
    """Reads examples to evaluate on: held-out, self-generated, and of other texts.

    Args:
        calibration: The calibration data.
        model: The model, which generates its own text.
        rows: Number of examples of each text.
        also: Other texts.
        tokenizer: Tokenizer to use instead of the one of the calibration data.
        generated: If False, leaves out self-generated text that is not a source of the calibration data.
        folder: Folder for self-generated text (see `Calibration.read`).
    """
    batches = calibration.held_out(model, rows, tokenizer, folder)
    others = replace(calibration, weights=None)
    length = example_length(model, calibration.length)
    if generated and GENERATED not in calibration.named:
        count = num_self_generated(calibration, rows, length)
        batches += replace(others, sources=GENERATED).held_out(model, count, folder=folder)
    for name, source in _others(calibration, also).items():
        read = replace(others, sources=source, tokens=rows * length).read(model, tokenizer)
        batches += [Batch(batch, name) for batch in read]
    return batches


def _others(calibration: Calibration, also: OtherTexts) -> dict[str, Source | Table]:
    """Returns other texts by name; objects of `datasets` get unused names."""
    if also is None or (isinstance(also, Sequence) and not also):
        return {}
    return name_sources(also, calibration.named)


def num_self_generated(calibration: Calibration, rows: int, length: int) -> int:
    """Returns the number of self-generated evaluation examples; fewer next to other texts."""
    return max(min(rows, MEASURED // length), 1)
