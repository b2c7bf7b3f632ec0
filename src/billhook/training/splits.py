"""Splits of the data in training: one held out where there is none to validate on, and those of several sources joined."""

from collections.abc import Sequence

import datasets
from lightning_utilities.core.rank_zero import rank_zero_info

from billhook.arguments import number
from billhook.calibration.reading import Rows, runs_on


def check_weights(weights: Sequence[float] | None, sources: int) -> None:
    """Refuses weights that are not a number above 0 for each of several sources."""
    if weights is None:
        return
    for weight in weights:
        number("weights", weight, above=0)
    if len(weights) != sources:
        raise ValueError(f"weights={weights!r} must be a number for each of {sources} sources in data")


def held_out(splits: dict[str, Rows], share: float, seed: int) -> dict[str, Rows] | None:
    """Moves a share of the training rows to a split `validation`; None where that cannot be done.

    They are drawn by `seed`; of text whose lines run on they are the last ones.
    """
    rows = splits.get("train")
    if not isinstance(rows, datasets.Dataset) or len(rows) < 2:
        return None
    parts = rows.train_test_split(test_size=share, seed=seed, shuffle=not runs_on(rows))
    return {**splits, "train": parts["train"], "validation": parts["test"]}


def tell_held_out(share: float, seed: int, examples: int) -> None:
    """Logs how many examples are held out to validate on, or why there are none."""
    if examples:
        rank_zero_info(
            f"billhook: the data has no split 'validation', so {examples} examples are held out of 'train': "
            f"{share:.3g} of its rows, drawn by seed {seed} (validation=0 trains on them too)"
        )
    else:
        rank_zero_info(
            "billhook: there is no validation, as the data has no such split and 'train' is a stream, or too short to hold "
            "something out of it: name a split 'validation' in data to have one"
        )


def join(parts: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> Rows:
    """Joins the rows of several sources: one after the other, or drawn by weights till each has been seen whole once.

    What is drawn of the others may then repeat.
    """
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(list(parts))
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(list(parts), shares, seed, stopping_strategy="all_exhausted")
