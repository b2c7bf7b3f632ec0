"""Images: folders and tables to batches, a fit that prunes a tiny ViT and saves it, and what is refused."""

import datasets
import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers import ViTForImageClassification as Classifier

import billhook as bh
from billhook.model.layers import prunable
from billhook.training.images import ImageDataModule
from billhook.training.metrics import metrics_of
from kit.families import llama
from kit.images import CLASSES, config, picture, write_photos, write_processor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return write_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def table(labels, **columns):
    rows = {"image": [picture(number) for number in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows | columns).cast_column("image", datasets.Image())


def batches(data, loader):
    return list(getattr(data, loader)()[0])


def test_a_folder_of_images(photos, processor):
    data = ImageDataModule(photos, processor, batch_size=4)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 12, "validation": 6}
    first, last = batches(data, "val_dataloader")
    assert list(data.names) == CLASSES
    assert torch.cat([first["labels"], last["labels"]]).tolist() == list(range(6))
    prepare = AutoImageProcessor.from_pretrained(processor)
    expected = prepare(
        [picture(number, "L" if number == 3 else "RGB").convert("RGB") for number in range(4)], return_tensors="pt"
    )
    assert torch.equal(first["pixel_values"], expected["pixel_values"])
    assert first["pixel_values"].shape == (4, 3, 16, 16)
    epochs = [torch.cat([batch["labels"] for batch in data.train_dataloader()]).tolist() for _ in range(2)]
    assert epochs[0] == epochs[1] != sorted(epochs[0])
    assert sorted(epochs[0]) == sorted([*range(6)] * 2)


@pytest.mark.parametrize("labels", [["dog", "ant", "dog", "elk"], [1, 0, 1, 2]], ids=["words", "numbers"])
def test_a_parquet_file(tmp_path, processor, labels):
    table(labels, other=list("abcd")).to_parquet(tmp_path / "a.parquet")
    data = ImageDataModule({"train": str(tmp_path / "a.parquet")}, processor, batch_size=2, validation=0)
    model = Classifier(config(num_labels=3))
    data.read(model)
    assert [data.splits["train"][number]["labels"] for number in range(4)] == [1, 0, 1, 2]
    assert set(data.splits["train"][0]) == {"pixel_values", "labels"}
    if labels[0] == "dog":
        assert model.config.label2id == {"ant": 0, "dog": 1, "elk": 2}


def test_rows_are_held_out_where_there_is_no_validation(processor):
    data = ImageDataModule(table([0, 1] * 5), processor, batch_size=2, validation=0.2)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 8, "validation": 2}


def test_a_fit_prunes_saves_and_is_loaded_with_equal_logits(photos, processor, tmp_path):
    torch.manual_seed(0)
    lit = bh.TransformerModule(config(), "image-classification", lr=1e-3)
    data, export = ImageDataModule(photos, processor, batch_size=4), bh.Export(str(tmp_path / "out"))
    pruning = bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=1, calibration=4)
    trainer = pl.Trainer(max_steps=3, callbacks=[pruning, export], enable_model_summary=False, **QUIET)
    trainer.fit(lit, datamodule=data)
    assert {"val_loss", "val_accuracy", "val_accuracy_top5"} <= trainer.callback_metrics.keys()
    linears = prunable(lit.model)
    assert len(linears) == 12
    assert all(float((one.weight == 0).float().mean()) == 0.5 for one in linears.values())
    assert lit.model.vit.embeddings.patch_embeddings.projection.weight.all()
    (event,) = pruning.events
    assert {"val_loss", "val_accuracy"} <= event["before"].keys() & event["after"].keys()

    model, pixels = lit.model.eval(), batches(data, "val_dataloader")[0]["pixel_values"]
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for loaded in (plain, bh.load(tmp_path / "out").eval()):
            assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert plain.config.id2label == dict(enumerate(CLASSES))
    saved = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert torch.equal(saved([picture(0)], return_tensors="pt")["pixel_values"][0], pixels[0])
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_top_five_is_right_where_the_label_is_among_five(photos, processor, tmp_path):
    torch.manual_seed(0)
    lit = bh.TransformerModule(config(), "image-classification")
    data = ImageDataModule(photos, processor, batch_size=4)
    (found,) = pl.Trainer(enable_model_summary=False, **QUIET).validate(lit, datamodule=data, verbose=False)
    with torch.no_grad():
        each = [(lit.model.eval()(one["pixel_values"]).logits, one["labels"]) for one in batches(data, "val_dataloader")]
    logits, labels = (torch.cat(part) for part in zip(*each, strict=True))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["val_accuracy"] == pytest.approx(float((ranks == 0).float().mean()))
    assert found["val_accuracy_top5"] == pytest.approx(float((ranks < 5).float().mean()))
    assert found["val_accuracy"] < found["val_accuracy_top5"]
    assert list(metrics_of("image-classification", 5)) == list(metrics_of("sequence-classification", 9)) == ["accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "the split 'train' has no column 'picture'. It has image, label, size"),
        ({"image_column": "size"}, "image_column='size' of the split 'train' contains no images"),
        ({"label_column": "class"}, "the split 'train' has no column 'class'"),
        ({"processor": None}, "processor=None: the model in training has no name or folder"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_is_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(table([0, 1], size=[20, 24]), **{"processor": processor, "validation": 0} | options).setup("fit")


def test_other_models_and_numbers_of_classes_are_refused(photos, processor):
    data = ImageDataModule(photos, processor)
    with pytest.raises(ValueError, match="cannot train LlamaForCausalLM, which does not classify images"):
        data.read(llama())
    with pytest.raises(ValueError, match="has 6 labels .* but the model has 4 classes"):
        data.read(Classifier(config(num_labels=4)))
    stream = table([0, 1]).to_iterable_dataset()
    with pytest.raises(ValueError, match="streaming is not supported for images"):
        ImageDataModule(stream, processor, validation=0).setup("fit")
    words = table([0, 1]).remove_columns("label").add_column("label", [0.5, 1.5])
    data = ImageDataModule(words, processor, validation=0)
    data.setup("fit")
    with pytest.raises(ValueError, match="the column 'label' must hold labels"):
        data.splits["train"][0]
