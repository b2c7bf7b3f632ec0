"""Callbacks read a calibration when they need it: the same as with the batches that it reads."""

import json

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser

import billhook as bh
from billhook.assets import model_path
from billhook.fit.event import describe_callback
from kit import prunes, shrinks
from kit.events import Own, loader
from kit.fits import trainer, weights

CALLBACKS = {
    "wanda": lambda **given: prunes.WeightPruning(sparsity=0.5, **given),
    "heads": lambda **given: bh.HeadPruning(0.5, **given),
    "structure": lambda **given: bh.StructuredPruning(bh.Amount(channels=0.5), repair=bh.RepairConfig(), **given),
    "shrink": lambda **given: shrinks.Shrinking(params=0.97, generations=0, **given),
    "depth": lambda **given: bh.DepthPruning(1, **given),
    "svd": lambda **given: bh.KVHeadConversion(2, method="svd", **given),
}


def test_records_say_objects_by_their_names():
    given = bh.Calibration([datasets.Dataset.from_dict({"text": ["a"]}), "tiny"])
    said = describe_callback(bh.DepthPruning(1, calibration=given))["calibration"]
    assert said["sources"] == ["dataset", "tiny"]
    assert "weights" not in said


@pytest.mark.parametrize("line", ["--texts.sources", "--texts"])
def test_a_command_line_gives_the_name_of_a_file_that_is_there(line, tmp_path):
    """Of a class that an annotation names, jsonargparse takes an existing file for a config."""
    file, config = tmp_path / "text.jsonl", tmp_path / "config.yaml"
    file.write_text('{"text": "a"}')
    config.write_text(f"sources: [{file}, tiny]")
    parser = ArgumentParser()
    parser.add_argument("--texts", type=bh.Calibration)
    read = parser.instantiate(parser.parse_args([line, str(file if line.endswith("sources") else config)])).texts
    assert read.sources == (str(file) if line.endswith("sources") else [str(file), "tiny"])


@pytest.mark.daily("wanda", "structure", "svd")
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_reads_it(name, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"Enter king {n}. Exit queen {n + 1}."}) for n in range(60)))
    given = bh.Calibration([str(file), "generated"], tokens=256, length=32, tokenizer=model_path("tiny"))
    found = []
    for read in (False, True):
        torch.manual_seed(0)
        lit = Own(vocab_size=2048)
        batches = [type(one)(one | {"labels": one["input_ids"]}, one.source) for one in given.read(lit)] if read else given
        callback = CALLBACKS[name](at="start", measure_batches=0, calibration=batches)
        trainer(tmp_path, [callback], max_steps=1).fit(lit, loader(), loader(4, 4))
        found.append(weights(lit))
    assert all(torch.equal(one, found[1][key]) for key, one in found[0].items())


@pytest.mark.parametrize("name", CALLBACKS)
def test_events_record_their_calibration(name, tmp_path):
    """Also after the event, when no more data is needed."""
    callback, lit = CALLBACKS[name](at=0, measure_batches=0, calibration=6), Own()
    trainer(tmp_path, [callback], max_steps=1).fit(lit, loader(), loader(4, 4))
    assert callback.events[-1]["by"]["calibration"] == {"from": "training data", "seed": 0, "examples": 6}


class Stream(torch.utils.data.IterableDataset):
    """Goes on where the last reader stopped, or starts again."""

    def __init__(self, again):
        self.rows, self.again = loader().dataset, again
        self.left = iter(self.rows)

    def __iter__(self):
        yield from self.rows if self.again else self.left


def test_a_stream_that_does_not_start_again_is_not_read(tmp_path):
    """Training would never see what calibration has read."""
    callback = bh.WeightPruning(sparsity=0.5, at=1, calibration=4, measure_batches=0)
    data = torch.utils.data.DataLoader(Stream(again=False), batch_size=2)
    with pytest.raises(ValueError, match="Stream can be read only once. Pass batches or"):
        trainer(tmp_path, [callback], max_steps=2).fit(Own(), data, loader(4, 4))
    trainer(tmp_path, [callback], max_steps=2).fit(
        Own(), torch.utils.data.DataLoader(Stream(again=True), batch_size=2), loader(4, 4)
    )
    assert len(callback.events) == 1


def test_events_leave_the_random_state_of_other_devices(tmp_path, monkeypatch):
    """torch.manual_seed seeds all devices."""
    seeds, lit, data = [], Own(), [loader(), loader(4, 4)]
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.mps, "_is_in_bad_fork", lambda: False)
    callback = bh.WeightPruning(sparsity=0.5, at=1, calibration=4, measure_batches=0)
    trainer(tmp_path, [callback], max_steps=2).fit(lit, *data)
    assert len(callback.events) == 1
    assert seeds == []
