"""A checkpoint that is exported by command has the record and the card that the callback `Export` gives."""

import json

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.checkpoints.export import export, history
from kit.events import Own, loader
from kit.fits import trainer
from kit.published import record_of

FOLDERS = ("exported", "by_command")


def fitted(folder):
    """Fits with events of two callbacks; returns the trainer, which exports at the end, and a checkpoint of the last step."""
    lit = Own()
    lit.net.config.name_or_path = "someone/a-model"
    calibration = bh.Calibration(tokens=96, length=12)
    given = {"calibration": calibration, "measure_batches": 0}
    keep = ModelCheckpoint(folder, "kept", every_n_train_steps=3)
    callbacks = [
        bh.StructuredPruning(bh.Amount(channels=0.5), at=2, **given),
        bh.DepthPruning(1, at=1, **given),
        bh.Degradation(calibration, examples=3),
        bh.Export(str(folder / FOLDERS[0]), rehearse=False),
        bh.Report(str(folder / "report.png"), measure_batches=0),
        keep,
    ]
    fit = trainer(folder, callbacks, max_steps=3)
    fit.fit(lit, loader(), loader(4, 4))
    return fit, keep.best_model_path


def of(folder, name, what="README.md"):
    text = (folder / name / what).read_text().replace(name, "NAME")
    return "\n".join(line for line in text.splitlines() if not line.startswith("| exported_from |"))


def test_after_the_fit_both_say_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    fit, _ = fitted(tmp_path)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    export(tmp_path / "end.ckpt", tmp_path / FOLDERS[1])
    cards, records = ([of(tmp_path, name, what) for name in FOLDERS] for what in ("README.md", "billhook.json"))
    assert cards[0] == cards[1]
    assert "- step 1: depth, 1 of 2 blocks\n  - 2 -> 1 blocks (BlockInfluence): without " in cards[0]
    assert "- step 2: structure, -" in cards[0]
    assert "| generated | calibrated on |" in cards[0]
    assert "base_model: someone/a-model" in cards[0]
    records = list(map(json.loads, records))
    assert [record_of(tmp_path / name)["steps"] for name in FOLDERS] == [3, 3]  # and no private path
    how = "amount Amount(channels=0.5); at 2; rounds 1; repair auto; calibration (sources generated; tokens 96; "
    assert f"| StructuredPruning | {how}" in cards[0]
    assert "| training | seed 5; precision 32-true; devices 1 |" in cards[0]
    assert records[0]["start"]["params"] == records[0]["events"][0]["before"]["params"]
    for name in ("start", "steps", "events", "degradation", "base_model", "training"):
        assert records[1][name] == records[0][name]
    assert [event["step"] for event in records[1]["events"]] == [1, 2]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / FOLDERS[1])
    assert plain.config.num_hidden_layers == 1


def test_before_the_end_degradation_is_that_of_the_last_event(tmp_path):
    _, kept = fitted(tmp_path)
    export(kept, tmp_path / FOLDERS[1])
    first, card = (of(tmp_path, name) for name in FOLDERS)
    begins, costs = card.split("## Size and quality\n\n")
    assert begins == first.split("## Size and quality\n\n")[0]
    assert costs.startswith("Right after step 2:\n\n| perplexity on |")
    record = json.loads(of(tmp_path, FOLDERS[1], "billhook.json"))
    assert f"| {record['events'][1]['degradation'][0]['after']:,.4g} |" in costs
    assert "degradation" not in record


EVENT = {"number": 0, "step": 1, "what": "less", "before": {}, "after": {}}
LOSS = dict.fromkeys(["source", "inside", "before", "after", "ratio", "ratio_error", "kl", "kl_error"], 1.0)
HOSTILE = {
    "no states": {},
    "how it was trained is no plain data": {"billhook_trained": {"training": {"seed": {1}}, "metrics": 3}},
    "an event is text": {"callbacks": {"a": {"events": ["b"], "last": "c"}}},
    "an event has no step": {"callbacks": {"a": {"events": [{name: EVENT[name] for name in EVENT if name != "step"}]}}},
    "a step is text": {"callbacks": {"a": {"events": [EVENT | {"step": "1"}]}}},
    "an event holds a tensor": {"callbacks": {"a": {"events": [EVENT | {"x": torch.ones(1)}]}}},
    "degradation holds a tensor": {"callbacks": {"a": {"last": [LOSS | {"kl": torch.ones(1)}]}}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_billhook_does_not_note_is_left_out(case):
    assert history(HOSTILE[case]) == {"events": []}


def test_what_it_notes_comes_in_order():
    states = {"a": {"events": [EVENT | {"step": 3}, EVENT | {"number": 2}]}, "b": {"events": [EVENT], "last": [LOSS]}}
    found = history({"callbacks": states})
    assert [(event["step"], event["number"]) for event in found["events"]] == [(1, 0), (1, 2), (3, 0)]
    assert found["degradation"] == [LOSS]
