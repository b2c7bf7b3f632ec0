"""Tokens of several sources, to show to a method."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from billhook.engine.batches import Batch, check_batches
from billhook.model.find import find_transformer
from billhook.model.preprocessors import tokenizer_of
from billhook.private_paths import without_folders

Source: TypeAlias = str | dict[str, str | list[str]]
"""`"generated"`, `"tiny"`, a file, a glob of files, a folder, a hub name, or files by split."""
Sources: TypeAlias = Source | Table | Sequence[Source | Table]
"""One or several, in Python also objects of `datasets`."""
SHOWN = 4
"""How many files of one split a source is named after, at most."""


def name_sources(sources: Sources, taken: Collection[str] = ()) -> dict[str, Source | Table]:
    """Returns sources by name: of a file its stem, of an object the name of its data set, numbered where another has it.

    Args:
        sources: One or several.
        taken: Names that no object is given.

    Raises:
        ValueError: If there is none, one cannot be read or is a stream, or two have a name in common.
    """
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    for source in listed:
        _check(source)
    by_name = dict[str, Source | Table]()
    for source in listed:
        name = _of_object(source, {*by_name, *taken}) if is_table(source) else _of_files(source)
        if name == GENERATED and source != GENERATED:
            raise ValueError(f"sources: '{source}' has the name of what the model writes, '{GENERATED}': rename it")
        if name in by_name or any(source is another for another in by_name.values()):
            raise ValueError(f"sources={sources!r} must be one or more, each once: '{name}' is there twice")
        by_name[name] = source
    if not by_name:
        raise ValueError(f"sources={sources!r} must be one or more, each once")
    return by_name


def _check(source: object) -> None:
    """Refuses what names no text and holds none, or none that rows can be drawn of."""
    check_data(source, "sources")
    if not is_table(source):
        return
    import datasets

    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(
            f"sources: rows are drawn of all that there are, and of a stream ({type(source).__name__}) nobody knows them: give a "
            "part of it, such as datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    if isinstance(source, datasets.DatasetDict) and "train" not in source:
        splits = ", ".join(map(str, source)) or "none"
        raise ValueError(f"sources: calibration needs a split 'train', and the DatasetDict has {splits}")


def _of_files(source: Source) -> str:
    """Names a source; files by split after those of `train`, a glob as it is written."""
    if isinstance(source, dict):
        files = source.get("train") or next(iter(source.values()), "")
        names = [_of_files(file) for file in ([files] if isinstance(files, str) else files)]
        shown = names if len(names) <= SHOWN else [*names[: SHOWN - 1], f"{len(names) - SHOWN + 1} more"]
        return " + ".join(shown)
    return Path(source).stem if Path(source).suffix and not has_magic(source) else source


def _of_object(source: Table, taken: Collection[str]) -> str:
    """Names an object after the data set that it was loaded from, if it has a name of its own."""
    info = (source["train"] if isinstance(source, Mapping) else source).info
    name = (info.dataset_name if info.dataset_name != info.builder_name else None) or "dataset"  # of files it is "json"
    numbered = chain([name], (f"{name} {number}" for number in count(2)))
    return next(candidate for candidate in numbered if candidate not in {*taken, GENERATED})


@dataclass(frozen=True)
class Calibration:
    """Text that a method is shown: packed token rows of one or several sources, also of what the model writes itself.

    A model that is cut and refitted for one kind of text gets worse at all others; the sources should be what it is for.

    Args:
        sources: One or several: `"generated"`, which is what the model itself writes; `"tiny"`; a file (.txt, .jsonl, .csv,
            .parquet) or a glob of files (`"chats/*.jsonl"`), a folder, a hub name (`"name"` or `"name:config"`) or files by
            split; in Python also a `Dataset` or `DatasetDict` of `datasets`, which is called by its `info.dataset_name`, or else
            `"dataset"`. Of splits, `train` is taken, and `held_out` takes `test` or `validation`. Without the column `column`,
            rows are chats, in a column `messages` or `conversations`, or columns `prompt` and `response`: both go through the
            chat template, with the column `tools` if there is one.
        weights: Share of the tokens for each source, in the same order; by default they are equal.
        tokens: How many there are of all sources together; a source that has fewer than its share gives all that it has.
        length: Tokens in a row; by default as many as the model reads, at most 512.
        batch_size: Rows in a batch, all of one source.
        column: The column that holds the text.
        tokenizer: A name or folder; by default that of the folder the model came from.
        seed: Decides which rows are drawn, and what the model writes.

    Raises:
        ValueError: If there is no source, one is a stream or a `DatasetDict` without `train`, two have one name, or a number is
            out of range; when it is read, if a source has not one row, or the model does not write text.

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
            raise ValueError(f"weights={self.weights!r} must be a number for each of {len(sources)} sources")

    @property
    def named(self) -> dict[str, Source | Table]:
        """The sources by name: a file's is its stem."""
        return name_sources(self.sources)

    def to_json(self) -> dict[str, Any]:
        """Returns what is set as plain data, for records; files by their names alone, an object of `datasets` by its own."""
        sources = [name if is_table(source) else source for name, source in self.named.items()]
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        public: dict[str, Any] = without_folders(
            {"sources": sources[0] if len(sources) == 1 else sources, "tokenizer": self.tokenizer}
        )
        return plain | public

    def examples(self, length: int) -> dict[str, int]:
        """Returns how many rows each source gives, at least one."""
        weights = [1.0] * len(self.named) if self.weights is None else self.weights
        shares = (self.tokens * weight / sum(weights) / length for weight in weights)
        return {name: max(round(share), 1) for name, share in zip(self.named, shares, strict=True)}

    def held_out(self, model: nn.Module, rows: int, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Batch]:
        """Reads so many rows of each source, if it has so many, that `read` does not give; to measure on.

        They are the first of the split `test`, or else of `validation`, or else other rows of the text; and what the model writes
        by another seed.
        """
        return self._rows(model, tokenizer, rows)

    def read(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Batch]:
        """Reads the sources, and lets the model write its part; returns the batches, those of the sources in turn.

        Args:
            model: The model, or a module that holds it.
            tokenizer: Instead of the one that is named.
        """
        return self._rows(model, tokenizer)

    def _rows(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, held_out: int | None = None) -> list[Batch]:
        subject = find_transformer(model)
        length, batches = example_length(subject, self.length), list[Batch]()
        if GENERATED in self.named:
            check_can_generate(subject)
        for name, wanted in self.examples(length).items():
            if name == GENERATED:
                number, seed = (wanted, self.seed) if held_out is None else (held_out, self.seed + 1)
                batches += generated(subject, examples=number, length=length, batch_size=self.batch_size, seed=seed)
            else:
                tokenizer = tokenizer or tokenizer_of(subject, self.tokenizer)
                rows = self._text(name, wanted, held_out, length, tokenizer)
                batches += [Batch({"input_ids": ids}, name) for ids in torch.split(rows, self.batch_size)]
        return batches

    def _text(self, name: str, count: int, held_out: int | None, length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Draws rows to show, or to hold out, of a text: `[rows, length]`."""
        splits = load_splits(self.named[name])
        if "train" not in splits:
            raise ValueError(f"sources: calibration needs a split 'train', and '{name}' has {', '.join(splits)}")
        other = next((split for split in ("test", "validation") if split in splits), None)
        if held_out is not None and other is not None:
            blocks: Any = self._blocks(splits[other], other, length, tokenizer)
            return torch.tensor(blocks[:held_out]["input_ids"])
        blocks = self._blocks(splits["train"], "train", length, tokenizer)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = order[:count] if held_out is None else order[count : count + held_out]
        if not drawn:
            left = f" but those to calibrate on: of {len(order)}, {count} are asked for; ask for fewer, or give a longer text"
            none = ": give a longer text, or a smaller length"
            raise ValueError(f"sources: '{name}' has no row of {length} tokens{left if order else none}")
        return torch.tensor(blocks[drawn]["input_ids"])

    def _blocks(self, rows: Any, split: str, length: int, tokenizer: PreTrainedTokenizerBase) -> Any:  # noqa: ANN401 - of `datasets`
        columns, documents = find_text_columns(rows, split, self.column), not is_line_text(rows)
        if documents:  # blank lines of a .txt file are part of its text
            warn_of_empty_rows(rows, split, columns)
        return map_rows(rows, pack, split, tokenizer, block_size=length, columns=columns, documents=documents)


Batches: TypeAlias = Iterable[Any] | Calibration
"""Batches as a model takes them, or where they come from."""


def read_batches(batches: Batches | None, model: nn.Module) -> Iterable[Any]:
    """Returns batches; of a calibration those that it reads, and where none are given those that the model itself writes."""
    if batches is None:
        try:
            check_can_generate(find_transformer(model))
        except ValueError as error:
            raise ValueError(f"batches=None: {error}: give batches") from error
        batches = Calibration()
    return check_batches(batches.read(model) if isinstance(batches, Calibration) else batches)


ADVICE = (
    "linears are refitted to one kind of text alone, as far as the batches say, so that the model may do worse on others: "
    'calibrate on bh.Calibration([..., "generated"]), which adds what the model itself writes'
)

OWN = (
    "KV heads are merged by what the model itself writes, and nothing else, which says too little of other text: "
    'show text of the kind that it is for, as by bh.Calibration(["train.txt", "generated"])'
)


def log_single_source(model: nn.Module, sources: Collection[str]) -> None:
    """Tells once, by the logger `billhook`, if a model that writes text is refitted to a single source of it, but its own.

    It is no warning, as nothing is wrong with one kind of text for a model that is to read no other.

    Args:
        model: The model.
        sources: The names of the sources of all batches, empty where batches name none.
    """
    if len(set(sources)) == 1 and GENERATED not in sources and isinstance(model, PreTrainedModel) and can_generate(model):
        log_once(ADVICE)


def log_only_self_generated(sources: Collection[str]) -> None:
    """Tells once, by the logger `billhook`, if KV heads are merged on nothing but what the model writes.

    Args:
        sources: The names of the sources of all batches, empty where batches name none.
    """
    if set(sources) == {GENERATED}:
        log_once(OWN)


def log_once(what: str) -> None:
    """Logs something by the logger `billhook`, on the first rank, unless it has been logged in this process."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0):
        _log(what)


@cache
def _log(what: str) -> None:
    logging.getLogger("billhook").warning(what)


MEASURED = 4096
"""How many tokens the model writes to be measured on, at most."""
OtherTexts = Sources | None
"""Texts that nothing is calibrated on."""


def check_other_texts(calibration: Calibration, also: OtherTexts) -> None:
    """Refuses other texts that have the name of one of the calibration's, or of each other, and what is no text."""
    for source in also if isinstance(also, Sequence) and not isinstance(also, str) else [also]:
        if source is not None:
            check_data(source, "also")
    if same := sorted(_others(calibration, also).keys() & {*calibration.named, GENERATED}):
        raise ValueError(f"also: '{same[0]}' is the name of another text, too, so their figures would be one: rename the file")


def evaluation_batches(
    calibration: Calibration,
    model: PreTrainedModel,
    rows: int,
    also: OtherTexts = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    written: bool = True,
) -> list[Batch]:
    """Reads so many rows of each text: held out of the calibration, `written` by the model, and of other texts."""
    batches, others = calibration.held_out(model, rows, tokenizer), replace(calibration, weights=None)
    length = example_length(model, calibration.length)
    if written and GENERATED not in calibration.named:
        batches += replace(others, sources=GENERATED).held_out(model, num_self_generated(calibration, rows, length))
    for name, source in _others(calibration, also).items():
        read = replace(others, sources=source, tokens=rows * length).read(model, tokenizer)
        batches += [Batch(batch, name) for batch in read]
    return batches


def _others(calibration: Calibration, also: OtherTexts) -> dict[str, Source | Table]:
    """Returns other texts by name; objects of `datasets` get none that the calibration has."""
    if also is None or (isinstance(also, Sequence) and not also):
        return {}
    return name_sources(also, calibration.named)


def num_self_generated(calibration: Calibration, rows: int, length: int) -> int:
    """Returns how many rows a model writes to be measured on: as many as of each text, or fewer beside other texts."""
    return rows if GENERATED in calibration.named else max(min(rows, MEASURED // length), 1)
