import json

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

from billhook import Amount, Export, KVHeadConversion, Report, StructuredPruning, WeightPruning
from kit.events import Own, loader
from kit.fits import data, module, trainer
from kit.published import record_of


def lines_of(out: str) -> dict[str, list[str]]:
    """The table's rows by their label."""
    rows = {}
    for line in out.splitlines():
        label, _, rest = line.partition("  ")
        rows[label] = rest.split()
    return rows


def run(files, folder, conversions, **options):
    lit = module()
    callbacks = [*conversions, Export(str(folder / "model")), Report(str(folder / "plots" / "report.png"))]
    trainer(folder, callbacks, val_check_interval=2, check_val_every_n_epoch=None, **options).fit(lit, data(files))
    return lit, callbacks


def test_table_and_picture_say_what_happened(files, tmp_path, capsys):
    lit, (conversion, _, report) = run(files, tmp_path, [KVHeadConversion(1, at=3)])
    rows = lines_of(capsys.readouterr().out)
    event = conversion.events[0]
    params = [f"{n:,}" for n in (event["before"]["params"], lit.model.num_parameters())]
    assert rows["dense"][0] == "0"
    assert rows["dense"][2:] == [params[0], "256"]  # 2 layers x (k + v) x 4 heads x 4 x 4 bytes
    assert rows["after 4 -> 1 KV heads (mean)"] == ["3", f"{event['after']['val_perplexity']:,.0f}", params[1], "64"]
    assert rows["end of training"][0] == "8"
    assert (tmp_path / "plots" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in report.history] == [2, 4, 6, 8]


@pytest.mark.nightly
def test_events_of_many_words_have_short_labels_and_the_rest_below(files, tmp_path, capsys):
    lit, (pruning, _, _) = run(files, tmp_path, [StructuredPruning(Amount(heads=0.5, channels=0.5), at=3, calibration=6)])
    (event,), out = pruning.events, capsys.readouterr().out
    share = 1 - event["after"]["params"] / event["before"]["params"]
    assert event["label"] == f"structure, -{100 * share:.2g}%"
    assert "without 8 heads in 2 attention modules, 48 channels in 2 modules; OutputNorm" in event["what"]
    assert max(map(len, out.splitlines())) <= 130
    assert f"\nafter {event['label']} " in out
    assert f"step 3 {event['what']} ".split() == out[out.index("\nstep 3 ") : out.index("\ncheckpoint ")].split()
    assert f"- step 3: {event['label']}\n  - {event['what']}\n" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Report(None), "plot_file=None must be a path that ends in .png"),
        (lambda: Report("x.foo"), "plot_file='x.foo' must be a path that ends in .png"),
        (lambda: Report(metric=3), "metric=3 must be a string"),
        (lambda: Report(measure_batches=-1), "measure_batches=-1 must be a whole number"),
        (lambda: Export(None), "folder=None must be a path"),
    ],
)
def test_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": -1, "max_epochs": 0}, {"limit_train_batches": 0}])
@pytest.mark.parametrize("make", [lambda _: KVHeadConversion(1), lambda folder: Export(str(folder / "model"))])
def test_a_fit_that_takes_no_step_is_refused(files, tmp_path, options, make):
    lit = module()
    with pytest.raises(ValueError, match=r"=0 takes no training step, so .* has no effect\. Train for at least one step"):
        trainer(tmp_path, [make(tmp_path)], **options).fit(lit, data(files))
    assert lit.model.config.num_key_value_heads == 4


def test_no_validation(files, tmp_path, capsys):
    run(files, tmp_path, [KVHeadConversion(2, at=3)], limit_val_batches=0)
    assert "end of training" in capsys.readouterr().out
    assert not (tmp_path / "plots").exists()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_resumed_run_reports_the_whole_run(files, tmp_path, capsys):
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    for steps, extra, path in ((4, [keep], None), (8, [], tmp_path / "step=4.ckpt")):
        callbacks = [KVHeadConversion(1, at=3), Report(str(tmp_path / "report.png")), *extra]
        trainer(tmp_path, callbacks, max_steps=steps, **options).fit(module(), data(files), ckpt_path=path)
    rows = lines_of(capsys.readouterr().out)
    assert [step for step, _ in callbacks[1].history] == [2, 6, 8]  # the checkpoint was written before validation at 4
    assert rows["after 4 -> 1 KV heads (mean)"][0] == "3"


def test_the_record_beside_the_checkpoint(files, tmp_path):
    lit, (conversion, export, _) = run(files, tmp_path, [KVHeadConversion(1, at=3)])
    record = record_of(tmp_path / "model")
    assert record["steps"] == 8
    assert record["start"]["val_perplexity"] != record["events"][0]["before"]["val_perplexity"]  # of step 0, and of step 3
    assert "|  | at the start | before | after | at the last validation |" in (tmp_path / "model" / "README.md").read_text()
    assert record["events"] == conversion.events
    assert export.saved.difference == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_key_value_heads == 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|endoftext|>"
    assert lit.model.training


def test_an_occupied_folder_is_refused_before_training(files, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    lit, export = module(), Export(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"is not a billhook checkpoint \(no billhook\.json\) and will not be overwritten"):
        trainer(tmp_path, [export]).fit(lit, data(files))
    assert lit.global_step == 0


def test_a_folder_that_fills_during_the_fit_does_not_cost_the_result(files, tmp_path):
    class Intruder(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "thesis.txt").write_text("years of work")

    export = Export(str(tmp_path / "model"))
    match = r"is not a billhook checkpoint \(no billhook\.json\) and will not be overwritten.* Saving to .*model-2 instead"
    with pytest.warns(UserWarning, match=match):
        trainer(tmp_path, [Intruder(), export], max_steps=1).fit(module(), data(files))
    assert export.saved.folder == str(tmp_path / "model-2")
    assert (tmp_path / "model" / "thesis.txt").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model-2").config.num_key_value_heads == 4


def test_a_trial_leaves_the_last_export_alone(files, tmp_path):
    export = Export(str(tmp_path / "model"))
    trainer(tmp_path, [export], max_steps=2).fit(module(), data(files))
    trainer(tmp_path, [export], max_steps=-1, fast_dev_run=1).fit(module(), data(files))
    assert json.loads((tmp_path / "model" / "billhook.json").read_text())["steps"] == 2
    assert export.saved is None


class Slashes(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = module().model

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_figures_of_any_name(files, tmp_path, capsys):
    def fit(**options):
        report = Report(str(tmp_path / "report.png"), **options)
        trainer(tmp_path, [KVHeadConversion(2, at=1), report], max_steps=2).fit(Slashes(), data(files))
        return capsys.readouterr().out

    assert "val/loss" in fit()
    assert (tmp_path / "report.png").exists()
    with pytest.warns(UserWarning, match="metric='val/los' is not logged in validation.*val/loss"):
        fit(metric="val/los")


@pytest.mark.parametrize("at", ["start", 3])
def test_weight_pruning_is_told_of_like_all_else(files, tmp_path, capsys, at):
    pruning = WeightPruning(sparsity=0.5, at=at, calibration=6)
    lit, (_, _, report) = run(files, tmp_path, [pruning])
    (event,) = pruning.events
    out, step = capsys.readouterr().out, 0 if at == "start" else 3
    rows, dense = lines_of(out), (event["before"] if at == "start" else report.first["after"])["val_perplexity"]
    assert out.split("---")[0].split()[-6:] == ["zeros", "parameters", "KV-cache", "bytes/token", "in", "float32"]
    assert rows["dense"][:2] == ["0", f"{dense:,.0f}"]
    assert rows["dense"][2] == "0.00"
    assert rows["end of training"][2] == "0.50"
    label = next(row for row in rows if row.startswith("after Wanda"))
    assert rows[label][:3] == [str(step), f"{event['after']['val_perplexity']:,.0f}", "0.50"]
    assert int(rows[label][3].replace(",", "")) == event["after"]["zeros"] > int(rows["dense"][3].replace(",", ""))
    assert json.loads((tmp_path / "model" / "billhook.json").read_text())["events"] == pruning.events


@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_plot_that_cannot_be_written_is_refused_before_training(tmp_path, way):
    (tmp_path / "plot.png").mkdir()
    (tmp_path / "file").touch()
    report = Report(str(tmp_path / "plot.png" if way == "folder" else tmp_path / "file" / "plot.png"))
    reason = "it is a folder" if way == "folder" else "file is not a folder that can be written to"
    with pytest.raises(ValueError, match=f"plot_file='.*' cannot be written, because .*{reason}. Pass another file."):
        trainer(tmp_path, [report], max_steps=1).fit(Own(), loader(), loader(4, 4))


def test_a_plot_that_fails_costs_nothing_else(tmp_path, capsys):
    """A folder takes its place while training runs."""

    class Taken(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "plot.png").mkdir()

    callbacks = [Taken(), Report(str(tmp_path / "plot.png")), Export(str(tmp_path / "model"))]
    with pytest.warns(UserWarning, match="Report: .*plot.png was not written"):
        trainer(tmp_path, callbacks, max_steps=1).fit(Own(), loader(), loader(4, 4))
    assert "end of training" in capsys.readouterr().out
    assert (tmp_path / "model" / "config.json").exists()
