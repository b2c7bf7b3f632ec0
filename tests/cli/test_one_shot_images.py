"""One-shot commands on a classifier of images: shown a folder of these, measured by accuracy, saved with its processor."""

import json

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

from billhook.calibration.examples import draw
from billhook.cli.main import main
from billhook.model.layers import prunable
from kit.images import config, picture, write_photos, write_processor


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with images, and a tiny ViT beside its processor."""
    folder = tmp_path_factory.mktemp("images")
    write_photos(folder / "photos")
    torch.manual_seed(0)
    ViTForImageClassification(config()).save_pretrained(folder / "vit")
    write_processor(folder / "vit")
    return folder


def pruned(here, out, command, *options):
    main([command, str(here / "vit"), str(out), "--device", "cpu", *options])
    record = json.loads((out / "billhook.json").read_text())
    pixels = AutoImageProcessor.from_pretrained(out)([picture(0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert not (out / "tokenizer.json").exists()
    return AutoModelForImageClassification.from_pretrained(out), record


def test_weights_become_zero(here, tmp_path, capsys):
    model, record = pruned(here, tmp_path / "out", "prune", "--sparsity", "0.5", "--data", str(here / "photos"))
    assert all(float((one.weight == 0).float().mean()) == 0.5 for one in prunable(model).values())
    assert record["accuracy"].keys() == {"before", "after", "examples"}
    assert record["calibration"]["examples"] == 12
    told = capsys.readouterr().out
    assert "Calibration data: photos, split 'train', 12 examples\nEvaluation data: photos, split 'validation', " in told


def test_blocks_and_channels_are_removed(here, tmp_path, capsys):
    options = ["--blocks", "1", "--channels", "0.5"]
    model, record = pruned(here, tmp_path / "out", "prune-structure", *options, "--data", str(here / "photos"))
    assert len(model.vit.layers) == 1
    assert model.vit.layers[0].mlp.fc1.weight.shape == (16, 16)
    assert [plan["kind"] for plan in record["plans"]] == ["blocks", "units"]
    assert record["accuracy"].keys() == {"before", "after", "examples"}
    assert record["accuracy"]["after"] is not None
    assert "Calibration data: photos, split 'train', " in capsys.readouterr().out


def test_files_of_parquet_do_what_a_folder_does(here, tmp_path):
    """With a file for each split of the folder."""
    files = {}
    for split, rows in datasets.load_dataset("imagefolder", data_dir=str(here / "photos")).items():
        files[split] = str(tmp_path / f"{split}.parquet")
        rows.to_parquet(files[split])
    by_folder, folder = pruned(here, tmp_path / "folder", "prune-structure", "--channels", "0.5", "--data", str(here / "photos"))
    by_file, record = pruned(here, tmp_path / "file", "prune-structure", "--channels", "0.5", "--data", json.dumps(files))
    assert record["accuracy"] == folder["accuracy"]
    assert record["accuracy"]["examples"] == 6
    assert all(torch.equal(one, other) for one, other in zip(by_file.parameters(), by_folder.parameters(), strict=True))


def test_images_to_measure_on_are_drawn_from_all_classes():
    assert draw(6, 64) == [0, 1, 2, 3, 4, 5]
    drawn = draw(1000, 64, seed=1)
    assert drawn == sorted(set(drawn))
    assert len({number // 100 for number in drawn}) == 10, "of a hundred images of each class, one after the other"


def test_without_data_weights_are_pruned_by_size_and_nothing_is_measured(here, tmp_path):
    model, record = pruned(here, tmp_path / "out", "prune", "--sparsity", "0.5", "--criterion", "Magnitude")
    assert all(float((one.weight == 0).float().mean()) == 0.5 for one in prunable(model).values())
    assert record["accuracy"]["before"] is None


def test_criteria_that_need_images_are_refused_without(here, tmp_path):
    with pytest.raises(SystemExit, match="data=None: .*ViTForImageClassification"):
        main(["prune", str(here / "vit"), str(tmp_path / "out"), "--sparsity", "0.5"])
    assert not (tmp_path / "out").exists()
