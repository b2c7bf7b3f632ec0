"""Degradation in a fit: what it tells, that it disturbs nothing, and what a resumed run knows."""

import copy
import json
import math

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import Logger

import billhook as bh
from billhook.model import load_tokenizer
from billhook.report import writing
from billhook.report.writing import Writing, write
from kit.events import EVENTS, Own, loader
from kit.families import BERT
from kit.fits import data, module, same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
]
ROWS = 3


def degradation(**options):
    return bh.Degradation(bh.Calibration(tokens=48, length=12), **{"examples": ROWS, **options})


def told(callbacks):
    """What was measured, in order."""
    found = [event["degradation"] for one in callbacks for event in getattr(one, "events", [])]
    return found + [one.last for one in callbacks if isinstance(one, bh.Degradation)]


@torch.no_grad()
def independent(dense, changed, rows):
    """Perplexity before and after, ratio, KL, and the standard errors of these two, in float64."""
    losses, kl = [], []
    for row in rows:
        p, q = (one.double().eval()(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for one in (dense, changed))
        losses.append([-float(one.gather(1, row[1:, None]).mean()) for one in (p, q)])
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
    (before, after), kl = torch.tensor(losses, dtype=torch.float64).T, torch.tensor(kl, dtype=torch.float64)
    ratio = math.exp((after - before).mean())
    errors = {"ratio_error": ratio * (after - before).std() / len(rows) ** 0.5, "kl_error": kl.std() / len(rows) ** 0.5}
    figures = {"before": before.mean().exp(), "after": after.mean().exp(), "ratio": ratio, "kl": kl.mean()} | errors
    return {name: float(value) for name, value in figures.items()}


class Memory(Logger):
    """Keeps what is logged, by step."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__):
        pass


class Copies(pl.Callback):
    """Keeps the model as it is right after each event: it stands behind."""

    def __init__(self, event):
        self.event, self.models = event, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(self.event.events) > len(self.models):
            self.models.append(copy.deepcopy(pl_module.net))


@pytest.mark.daily("wanda", "structure")
@pytest.mark.parametrize("event", EVENTS)
def test_after_each_event_and_at_the_end_and_nothing_is_disturbed(tmp_path, event):
    lit, dense, mine = Own(attention_dropout=0.3), Own().net, degradation()
    callback = EVENTS[event](2)
    watch = Copies(callback)
    torch.manual_seed(1)
    trainer(tmp_path, [callback, watch, mine], max_steps=4).fit(lit, loader(), loader(4, 4))
    (at_event, at_end), rows = told([callback, mine]), [ids for _, ids in mine._dense.rows]
    end = copy.deepcopy(lit.net)
    for found, changed in ((at_event, watch.models[0]), (at_end, end)):
        assert [(one["source"], one["inside"], one["rows"]) for one in found] == [("generated", True, ROWS)]
        expected = independent(copy.deepcopy(dense), changed, rows)
        assert {name: found[0][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    plain = Own(attention_dropout=0.3)
    torch.manual_seed(1)
    trainer(tmp_path, [EVENTS[event](2)], max_steps=4).fit(plain, loader(), loader(4, 4))
    assert same(weights(lit), weights(plain))
    assert all(part.training for part in lit.modules())


@pytest.mark.parametrize("late", [False, True])
def test_an_event_before_the_fit_is_measured_wherever_it_stands_in_the_list(tmp_path, late):
    class Late(Own):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            self.net = self.net or Own().net

    for order in (1, -1):
        callbacks = [bh.KVHeadConversion(2), degradation()][::order]
        trainer(tmp_path, callbacks, max_steps=1).fit(Late() if late else Own(), loader(), loader(4, 4))
        start, end = told(callbacks)
        assert start[0]["before"] == end[0]["before"]
        assert start[0]["kl"] > 1e-4


def test_of_several_rounds_at_once_the_last_is_measured(tmp_path):
    callback = bh.StructuredPruning(bh.Amount(channels=0.5), at=1, rounds=2, calibration=4, measure_batches=0)
    trainer(tmp_path, [callback, degradation()], max_steps=1).fit(Own(), loader(), loader(4, 4))
    assert ["degradation" in event for event in callback.events] == [False, True]


def test_a_resumed_run_tells_what_the_straight_one_does(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight = [EVENTS["mean"](2), degradation(), keep]
    trainer(tmp_path, straight, max_steps=3).fit(Own(), loader(), loader(4, 4))
    for stop in (1, 2):
        resumed = [EVENTS["mean"](2), degradation()]
        path = tmp_path / f"step={stop}.ckpt"
        trainer(tmp_path, resumed, max_steps=3).fit(Own(), loader(), loader(4, 4), ckpt_path=path)
        assert told(resumed) == told(straight)
    kept = torch.load(path, weights_only=True)["callbacks"]["Degradation"]
    assert sum(one.numel() for one in [*kept["ids"], kept["losses"]]) == ROWS * 13


def test_resumed_with_another_model_the_ratio_is_told_and_the_divergence_is_not(tmp_path, capsys):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight = [EVENTS["mean"](2), degradation(), keep]
    trainer(tmp_path, straight, max_steps=3).fit(Own(), loader(), loader(4, 4))
    other, resumed = Own(), [EVENTS["mean"](2), degradation(), bh.Report(str(tmp_path / "plot.png"))]
    with torch.no_grad():
        other.net.lm_head.weight.mul_(2)
    run = trainer(tmp_path, resumed, max_steps=3)
    with pytest.warns(UserWarning, match="differ from those of the resumed run.*KL divergence is not measured"):
        run.fit(other, loader(), loader(4, 4), ckpt_path=tmp_path / "step=1.ckpt")
    for mine, then in zip(told(resumed), told(straight), strict=True):
        compared = [f"{name}{end}" for name in ("kl", "agreement", "acceptance") for end in ("", "_error")]
        assert mine == [then[0] | dict.fromkeys(compared, "nan")]
    table = capsys.readouterr().out.partition("perplexity on")[2]
    assert table
    assert not {"KL", "unknown"} & {*table.split()}  # columns without a figure


def test_texts_in_the_table_the_record_and_the_loggers(tmp_path, files, capsys):
    text = bh.Calibration({"train": files["train"]}, tokens=64, length=16)
    (tmp_path / "other.txt").write_text("A hydra is an animal of fresh water. " * 40)
    mine = bh.Degradation(text, also=str(tmp_path / "other.txt"), examples=2)
    callbacks = [EVENTS["mean"](1), mine, bh.Export(str(tmp_path / "out")), bh.Report(str(tmp_path / "plot.png"))]
    lit, logger = module(num_attention_heads=4), Memory()
    trainer(tmp_path, callbacks, max_steps=2, logger=logger, log_every_n_steps=1).fit(lit, data(files))
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    start, end = told(callbacks)
    assert record["degradation"] == end
    assert record["events"][0]["degradation"] == start
    assert sorted(record["files"]) == sorted(one.name for one in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- step 1: {callbacks[0].events[0]['what']}\n- 2 training steps\n" in card
    assert f"| other | not calibrated on | {end[2]['before']:,.4g} | {end[2]['after']:,.4g} | {end[2]['ratio']:.3f} ±" in card
    assert [(one["source"], one["inside"]) for one in end] == [("train", True), ("generated", False), ("other", False)]
    for step, found in ((0, start), (2, end)):  # with the first step of training
        for one in found:
            names = {"perplexity": "after", "perplexity_ratio": "ratio"}
            names |= {name: name for name in ("kl", "agreement", "acceptance")}
            logged = {name: logger.rows[step][f"degradation/{one['source']}/{name}"] for name in names}
            assert logged == {name: one[own] for name, own in names.items()}
    said = capsys.readouterr().out
    assert f"after {callbacks[0].events[0]['what']}\nperplexity on" in said
    last = said.split("end of training\n")[1].splitlines()
    assert [line.split()[0] for line in last[2:5]] == ["train", "generated", "other"]
    assert f"{end[2]['ratio']:.3f} ± {end[2]['ratio_error']:.3f}" in last[4]


TIGHT, LOOSE = bh.Limits(max_ratio=1 + 1e-6), bh.Limits(max_ratio=100.0, min_agreement=0.0)


@pytest.mark.filterwarnings("ignore:(Degradation, step|Export failed)")
def test_a_broken_limit_ends_training_and_the_export_refuses(tmp_path):
    callbacks = [EVENTS["mean"](2), degradation(stop=TIGHT), bh.Export(str(tmp_path / "out"))]
    run = trainer(tmp_path, callbacks, max_steps=9)
    with (
        pytest.warns(UserWarning, match=r"limit\. max_ratio=1: generated 1\.\d+.*Training ends"),
        pytest.raises(ValueError, match="Export: the model breaks a limit of Degradation. max_ratio=1: generated"),
    ):
        run.fit(Own(), loader(), loader(4, 4))
    assert run.global_step == 2
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out-unverified").is_dir()


def test_an_event_at_the_start_that_breaks_a_limit_is_an_error(tmp_path):
    callbacks = [EVENTS["mean"]("start"), degradation(stop=TIGHT), bh.Export(str(tmp_path / "out"))]
    run = trainer(tmp_path, callbacks, max_steps=9)
    with pytest.raises(
        ValueError, match=r"Degradation, step 0, after 4 -> 2 KV heads \(mean\): the model breaks a limit\. max_rat"
    ):
        run.fit(Own(), loader(), loader(4, 4))
    assert run.global_step == 0
    assert not [*tmp_path.glob("out*")]


def test_limits_that_hold_change_nothing(tmp_path):
    callbacks = [EVENTS["mean"](2), degradation(stop=LOOSE), bh.Export(str(tmp_path / "out"))]
    run = trainer(tmp_path, callbacks, max_steps=4)
    run.fit(Own(), loader(), loader(4, 4))
    assert run.global_step == 4
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop": bh.Limits(max_unseen_ratio=1.5)}, "max_unseen_ratio=1.5 has no figure, because every text was calibrated on"),
        ({"stop": bh.Limits(max_loops=0.1)}, "max_loops=0.1 has no figure, because prompts=0 writes no text"),
    ],
)
def test_a_limit_without_a_figure_is_refused_before_training(tmp_path, options, match):
    callback, lit = EVENTS["mean"]("start"), Own()
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, [degradation(**options), callback], max_steps=1).fit(lit, loader(), loader(4, 4))
    assert not callback.events


def test_what_the_model_writes_is_told_recorded_and_resumed(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 8)

    def fit(folder, checkpoint=None):
        measures = bh.Degradation(bh.Calibration({"train": files["train"]}, tokens=64, length=16), examples=2, prompts=2)
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [EVENTS["mean"](1), measures, bh.Export(str(folder)), bh.Report(str(tmp_path / "plot.png"))]
        lit, dense = module(num_attention_heads=4), module(num_attention_heads=4).model
        trainer(tmp_path, [*callbacks, *([] if checkpoint else [keep])], max_steps=2).fit(lit, data(files), ckpt_path=checkpoint)
        return lit.model, dense, measures, callbacks[0].events[0]

    model, dense, measures, event = fit(tmp_path / "out")
    prompts = [tokens[:32].tolist() for _, tokens in measures._dense.rows]  # two of the file, two of generated text
    tokenizer = load_tokenizer("tiny")
    prompts = [tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] for ids in prompts]
    for number, found in enumerate(measures.written):
        assert found["temperature"] == (0.0, 0.7)[number]
        for when, written_by in (("before", dense), ("after", model)):
            assert found[when]["loops"] == Writing.of(write(written_by, prompts)[number]).loops
            assert found[when]["texts"] == 4
    assert [texts["before"] for texts in event["written"]] == [texts["before"] for texts in measures.written]
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert record["written"] == json.loads(json.dumps(measures.written))
    assert record["events"][0]["written"] == json.loads(json.dumps(event["written"]))
    assert "| texts written |" in (tmp_path / "out" / "README.md").read_text()
    assert capsys.readouterr().out.count("texts written") == 2
    _, _, resumed, _ = fit(tmp_path / "again", tmp_path / "step=1.ckpt")
    assert resumed.written == measures.written


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        (lambda folder: [bh.Export(str(folder / "out")), degradation()], "Export must be listed after Degradation"),
        (lambda folder: [bh.Report(str(folder / "plot.png")), degradation()], "Report must be listed after Degradation"),
        (lambda _: [degradation(), WeightAveraging()], "Degradation must be listed after WeightAveraging"),
    ],
)
def test_the_wrong_place_is_refused(tmp_path, callbacks, match):
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, callbacks(tmp_path), max_steps=1).fit(Own(), loader(), loader(4, 4))


class Encoder(Own):
    """Training of an encoder toward outputs of zero."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.lr = getattr(transformers, kind)(transformers.BertConfig(**BERT)).train(), 1e-3

    def training_step(self, batch, batch_idx):
        return self.net(**{name: tensor for name, tensor in batch.items() if name != "labels"})[0].square().mean()

    validation_step = None


@pytest.mark.parametrize(("kind", "figure"), [("BertForMaskedLM", "agreement"), ("BertModel", "cosine")])
def test_encoders_are_compared_by_labels_or_cosine_and_write_nothing(tmp_path, files, kind, figure):
    text = bh.Calibration({"train": files["train"]}, tokens=64, length=16, tokenizer="tiny")

    def fit(folder, checkpoint=None, **options):
        measures, logger = bh.Degradation(text, examples=2, **options), Memory()
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [EVENTS["wanda"](1), measures, bh.Export(str(folder)), *([] if checkpoint else [keep])]
        trainer(tmp_path, callbacks, max_steps=2, logger=logger, log_every_n_steps=1).fit(
            Encoder(kind), loader(), ckpt_path=checkpoint
        )
        return measures.last, logger.rows[2]

    with pytest.raises(ValueError, match=f"prompts=1: {kind} predicts no next token"):
        fit(tmp_path / "out", prompts=1)
    with pytest.raises(ValueError, match="max_unseen_ratio=2 has no figure, because the models predict no next token"):
        fit(tmp_path / "out", stop=bh.Limits(max_unseen_ratio=2.0))
    (end,), logged = fit(tmp_path / "out", stop=bh.Limits(**{f"min_{figure}": 0.0}))
    assert 0 < end[figure] < 1
    assert end["ratio"] == "nan"
    assert logged[f"degradation/train/{figure}"] == pytest.approx(end[figure])
    assert "degradation/train/perplexity" not in logged
    assert json.loads((tmp_path / "out" / "billhook.json").read_text())["degradation"] == [end]
    head = "cosine" if figure == "cosine" else "KL | same label"
    assert f"| outputs on |  | {head} |" in (tmp_path / "out" / "README.md").read_text()
    again, _ = fit(tmp_path / "again", tmp_path / "step=1.ckpt")
    assert again == [end]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bh.Degradation("a.txt"), "texts='a.txt' must be a Calibration"),
        (lambda: degradation(examples=0), "examples=0 must be a whole number of at least 1"),
        (
            lambda: bh.Degradation(bh.Calibration("a.txt"), also=["b.txt", "elsewhere/a.txt"]),
            "also: 'a' is the name of another text",
        ),
        (lambda: degradation(also=3), "also=3 must be"),
        (lambda: degradation(prompts=-1), "prompts=-1 must be a whole number of at least 0"),
        (lambda: degradation(stop=0.5), "stop=0.5 must be"),
    ],
)
def test_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
