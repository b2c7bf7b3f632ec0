"""Metrics reach each logger that a fit has."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import billhook as bh
from kit.fits import data, module, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|google|torch).*"),
]


def fitted(files, folder, loggers):
    """Converts in the middle of a fit, with degradation and a report."""
    calibration = bh.Calibration(files["train"], tokens=64, length=16)
    callbacks = [bh.KVHeadConversion(1, at=2, measure_batches=1), bh.Degradation(calibration, examples=2)]
    callbacks += [bh.Report(str(folder / "report.png"), measure_batches=1)]
    trainer(folder, callbacks, max_steps=3, logger=loggers, limit_val_batches=1).fit(module(), data(files))


def test_tensorboard(files, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fitted(files, tmp_path, logger)
    read = EventAccumulator(logger.log_dir)
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("kv_cache_bytes")] == [(0, 256), (1, 64)]
    assert [one.step for one in read.Scalars("degradation/train/perplexity_ratio")] == [1, 3]
