"""Texts that the damage of a change is measured on."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.calibration.calibration import Calibration
from billhook.calibration.generated import NAME as GENERATED
from billhook.calibration.generated import row_length
from billhook.calibration.reading import Table, check_data
from billhook.calibration.sources import Source, Sources, named
from billhook.engine.batches import Batch

MEASURED = 4096
"""How many tokens the model writes to be measured on, at most."""
Also = Sources | None
"""Texts that nothing is calibrated on."""


def check_also(calibration: Calibration, also: Also) -> None:
    """Refuses other texts that have the name of one of the calibration's, or of each other, and what is no text."""
    for source in also if isinstance(also, Sequence) and not isinstance(also, str) else [also]:
        if source is not None:
            check_data(source, "also")
    if same := sorted(_others(calibration, also).keys() & {*calibration.named, GENERATED}):
        raise ValueError(f"also: '{same[0]}' is the name of another text, too, so their figures would be one: rename the file")


def texts(
    calibration: Calibration,
    model: PreTrainedModel,
    rows: int,
    also: Also = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    written: bool = True,
) -> list[Batch]:
    """Reads so many rows of each text: held out of the calibration, `written` by the model, and of other texts."""
    found, how = calibration.held_out(model, rows, tokenizer), replace(calibration, weights=None)
    length = row_length(model, calibration.length)
    if written and GENERATED not in calibration.named:
        found += replace(how, sources=GENERATED).held_out(model, written_rows(calibration, rows, length))
    for name, source in _others(calibration, also).items():
        read = replace(how, sources=source, tokens=rows * length).read(model, tokenizer)
        found += [Batch(one, name) for one in read]
    return found


def _others(calibration: Calibration, also: Also) -> dict[str, Source | Table]:
    """Returns other texts by name; objects of `datasets` get none that the calibration has."""
    none = also is None or (isinstance(also, Sequence) and not also)
    return {} if none or also is None else named(also, calibration.named)


def written_rows(calibration: Calibration, rows: int, length: int) -> int:
    """Returns how many rows a model writes to be measured on: as many as of each text, or fewer beside other texts."""
    return rows if GENERATED in calibration.named else max(min(rows, MEASURED // length), 1)
