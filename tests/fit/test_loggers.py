"""Figures, the picture of a report and the model card reach the loggers that a fit has, the packages' own."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import billhook as bh
from billhook.fit.measure import log_card, log_plot
from kit.fits import data, module, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|mlflow|google|opentelemetry|pydantic|torch).*"),
]
PNG = b"\x89PNG"


def fitted(files, folder, loggers):
    """Converts in the middle of a fit, with degradation, an export and a report; returns the card's text."""
    calibration = bh.Calibration(files["train"], tokens=64, length=16)
    callbacks = [bh.KVHeadConversion(1, at=2, measure_batches=1), bh.Degradation(calibration, examples=2)]
    callbacks += [bh.Export(str(folder / "model"), rehearse=False), bh.Report(str(folder / "report.png"), measure_batches=1)]
    trainer(folder, callbacks, max_steps=3, logger=loggers, limit_val_batches=1).fit(module(), data(files))
    return (folder / "model" / "README.md").read_text()


def test_csv(files, tmp_path):
    logger = CSVLogger(tmp_path)
    card = fitted(files, tmp_path, logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["kv_cache_bytes"] for row in rows if row["kv_cache_bytes"]] == ["256.0", "64.0"]
    assert all(row["epoch"] for row in rows)
    assert len([row for row in rows if row["degradation/train/perplexity_ratio"]]) == 2  # after the event, and at the end
    assert (Path(logger.log_dir) / "report_3.png").read_bytes().startswith(PNG)
    assert (Path(logger.log_dir) / "model_card.md").read_text() == card


def test_tensorboard(files, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    card = fitted(files, tmp_path, logger)
    read = EventAccumulator(logger.log_dir)
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("kv_cache_bytes")] == [(0, 256), (1, 64)]
    assert [one.step for one in read.Scalars("degradation/train/perplexity_ratio")] == [1, 3]
    (picture,) = read.Images("report")
    assert picture.step == 3
    assert picture.encoded_image_string.startswith(PNG)
    (text,) = read.Tensors("model_card/text_summary")
    assert text.tensor_proto.string_val[0].decode() == card


@pytest.mark.nightly
def test_mlflow(files, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    monkeypatch.chdir(tmp_path)
    store = (tmp_path / "store").as_uri()
    logger = MLFlowLogger("cuts", tracking_uri=store)
    card = fitted(files, tmp_path, logger)
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("cuts").experiment_id])
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "kv_cache_bytes")] == [(0, 256), (1, 64)]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "degradation/train/perplexity_ratio")] == [1, 3]
    kept = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert {"report_3.png", "model_card"} <= kept
    assert Path(client.download_artifacts(run.info.run_id, "report_3.png")).read_bytes().startswith(PNG)
    assert Path(client.download_artifacts(run.info.run_id, "model_card/README.md")).read_text() == card


class Artifact:
    """As wandb documents it."""

    def __init__(self, name, type):  # noqa: A002
        self.name, self.type, self.files = name, type, []

    def add_file(self, path):
        self.files.append(Path(path).read_text())


def test_wandb_as_its_api_is_documented(tmp_path, monkeypatch):
    """Stands for wandb, which takes 62 MB, with the calls that its documentation names."""
    kept, images = [], []
    logger = WandbLogger.__new__(WandbLogger)
    logger._experiment = SimpleNamespace(id="abc", log_artifact=kept.append)
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: self._experiment))
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images_of, step: images.append((key, images_of, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Artifact=Artifact))
    (tmp_path / "README.md").write_text("# A card")
    epochs = SimpleNamespace(_batches_that_stepped=7)
    fit = SimpleNamespace(loggers=[logger], is_global_zero=True, global_step=7, fit_loop=SimpleNamespace(epoch_loop=epochs))
    log_plot(fit, "report", "the figure")
    log_card(fit, tmp_path / "README.md")
    assert images == [("report", ["the figure"], 7)]
    assert [(one.name, one.type, one.files) for one in kept] == [("model-card-abc", "model-card", ["# A card"])]


class Plain(Logger):
    """A logger of a user's own, of figures alone, or one that fails."""

    name, version = "plain", 0

    def __init__(self, board=None):
        super().__init__()
        self.experiment = board

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_that_takes_none_is_left_alone_and_one_that_fails_costs_no_training(files, tmp_path):
    def full(*_, **__):
        raise OSError("the disk is full")

    loggers = [Plain(), Plain(SimpleNamespace(add_figure=full, add_text=full)), last := CSVLogger(tmp_path)]
    with pytest.warns(UserWarning, match="Plain could not log the") as told:
        card = fitted(files, tmp_path, loggers)
    said = [str(one.message) for one in told if "could not log" in str(one.message)]
    assert said == [f"Plain could not log the {what}: OSError: the disk is full" for what in ("model card", "plot report")]
    assert (Path(last.log_dir) / "model_card.md").read_text() == card


def test_other_ranks_give_nothing(tmp_path):
    board = SimpleNamespace(add_figure=pytest.fail, add_text=pytest.fail)
    fit = SimpleNamespace(loggers=[Plain(board)], is_global_zero=False, global_step=7)
    log_plot(fit, "report", None)
    log_card(fit, tmp_path / "README.md")
