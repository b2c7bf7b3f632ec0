"""`billhook evaluate` on classifiers of images: accuracy, top five, and agreement with the first model."""

import json

import datasets
import pytest
import torch
from transformers import ViTForImageClassification

import billhook as bh
from billhook.cli.main import main
from kit.images import CLASSES, config, picture, write_photos, write_processor


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with images, a tiny ViT beside its processor, and another that numbers the same classes from the end."""
    folder = tmp_path_factory.mktemp("images")
    write_photos(folder / "photos")
    torch.manual_seed(0)
    names = {"vit": CLASSES, "backwards": CLASSES[::-1]}
    for name, classes in names.items():
        numbers = {label: number for number, label in enumerate(classes)}
        model = ViTForImageClassification(config(label2id=numbers, id2label=dict(enumerate(classes)), initializer_range=0.5))
        model.save_pretrained(folder / name)
        write_processor(folder / name)
    rows = {"picture": [picture(number) for number in range(6)], "kind": list(range(6))}
    datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image()).to_parquet(folder / "rows.parquet")
    return folder


def classes_of(folder, data):
    """What a model takes each validation image for, by name, with the five likeliest: an image at a time."""
    model = bh.load(folder).eval()
    names, rows = model.config.id2label, data.splits["validation"]
    with torch.no_grad():
        orders = [model(rows[number]["pixel_values"][None]).logits[0].argsort(descending=True).tolist() for number in range(6)]
    return [[names[number] for number in order] for order in orders]


def test_models_that_number_classes_otherwise_are_compared_by_name(here, tmp_path, capsys):
    models, out = [str(here / "vit"), str(here / "backwards")], tmp_path / "out.json"
    main(["evaluate", *models, "--data", str(here / "photos"), "--batch_size", "4", "--device", "cpu", "--json", str(out)])
    said, record = capsys.readouterr().out, json.loads(out.read_text())
    data = bh.training.ImageDataModule(str(here / "photos"), models[0])
    data.setup("fit")
    orders = [classes_of(folder, data) for folder in models]
    assert orders[0] != orders[1]
    for own, about in zip(orders, record["models"], strict=True):
        (answers,) = about["answers"].values()
        assert [one["class"] for one in answers] == [order[0] for order in own]
        assert [one["label"] for one in answers] == CLASSES
        right = sum(order[0] == label for order, label in zip(own, CLASSES, strict=True)) / 6
        among = sum(label in order[:5] for order, label in zip(own, CLASSES, strict=True)) / 6
        agreed = sum(a[0] == b[0] for a, b in zip(own, orders[0], strict=True)) / 6
        figures = {one["measure"]: one["value"] for one in about["figures"]}
        assert figures == {"acc": pytest.approx(right), "acc_top5": pytest.approx(among), "agreement": pytest.approx(agreed)}
    assert agreed < 1
    assert [line.split()[2] for line in said.splitlines()[2:5]] == ["acc", "acc_top5", "agreement"]
    assert "photos (6)" in said
    assert record["settings"]["column"] == "image"


def test_a_parquet_file_and_fewer_images(here, tmp_path, capsys):
    out = tmp_path / "out.json"
    columns = ["--column", "picture", "--label_column", "kind"]
    given = ["evaluate", str(here / "vit"), "--data", str(here / "rows.parquet"), *columns, "--json", str(out)]
    main([*given, "--limit", "4", "--dtype", "bfloat16"])
    (answers,) = json.loads(out.read_text())["models"][0]["answers"].values()
    assert len(answers) == 4
    assert [one["label"] for one in answers] == [one["image"] for one in answers]
    said = capsys.readouterr().out
    assert "rows (4)" in said
    assert "agreement" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--data", "PHOTOS"], "models: 'tiny' is no image classifier, but other models are"),
        (["--text", "tiny"], "text='tiny' is for language models, but '.*vit' classifies images. Pass only --data"),
        (["--data", "PHOTOS", "--tasks", "hellaswag"], r"tasks=\['hellaswag'\] is for language models"),
        (["--data", "PHOTOS", "--length", "64"], "length=64 is for language models"),
        (["--data", "PHOTOS", "--stream"], "stream=True is for language models"),
        (["--data", "PHOTOS", "--column", "picture"], "the split '.*' has no column 'picture'. It has image, label"),
        (["--data", "none.parquet"], "the file 'none.parquet' of the split 'train' does not exist"),
        (["FOUR", "--data", "PHOTOS"], "models: the numbers of classes differ .*vit 6, .*four 4"),
    ],
)
def test_refusals_come_before_any_model_is_loaded(here, tmp_path, arguments, message, monkeypatch):
    config(num_labels=4, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "four")
    monkeypatch.setattr("billhook.cli.evaluate.load", None)
    places = {"PHOTOS": str(here / "photos"), "FOUR": str(tmp_path / "four")}
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", str(here / "vit"), *(places.get(one, one) for one in arguments)])


def test_labels_that_a_model_has_not(here, tmp_path):
    rows = {"image": [picture(0)], "label": [6]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SystemExit, match="rows.parquet' has the label 6, but the classes of '.*vit' are 0 to 5"):
        main(["evaluate", str(here / "vit"), "--data", str(tmp_path / "rows.parquet")])
