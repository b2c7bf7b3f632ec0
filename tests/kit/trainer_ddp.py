"""What each of two processes runs in transformers' Trainer: masks later and fewer KV heads at the start, and what cannot be."""

import sys
from pathlib import Path

import torch

import billhook as bh
from kit import prunes
from kit.events import Own, loader
from kit.trainers import calibration, train


def callbacks():
    """Fewer KV heads at the start, and masks by a calibration on training data, which the processes share."""
    return [
        bh.KVHeadConversion(2, method="svd", calibration=calibration()),
        prunes.WeightPruning(sparsity=0.5, at=2, calibration=4),
    ]


def main(folder: Path) -> None:
    """Trains, and writes what came of it."""
    given = callbacks()
    model, run = train(folder, given, validation=loader(4, 4), per_device_train_batch_size=1)
    later = ""
    try:
        train(folder, [bh.KVHeadConversion(2, at=2)], Own().net, per_device_train_batch_size=1)
    except ValueError as error:
        later = str(error)
    if run.args.process_index == 0:
        events = [event for callback in given for event in callback.events]
        torch.save({"weights": model.state_dict(), "events": events, "later": later}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
