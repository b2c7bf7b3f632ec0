"""Measures classifiers of images: accuracy, also among the five likeliest, and agreement with the first of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.assets import model_path
from billhook.calibration.reading import check_available
from billhook.model.meta import from_name, model_class, read_config
from billhook.progress import OnProgress, progress_bar
from billhook.training.dataset_module import draw
from billhook.training.evaluation import Figure, mean
from billhook.training.images import ImageDataModule
from billhook.training.metrics import TOP

Work = Callable[[PreTrainedModel], tuple[list[Figure], dict[str, Any]]]
"""Measures a model; returns its figures, and what is recorded about it."""
COLUMN = "image"
"""The column of images, where no other is asked for."""


def classifies(name: str) -> bool:
    """Tells whether a name is that of a classifier of images."""
    path = model_path(name)
    kind = model_class(read_config(path), path)
    return kind.main_input_name == "pixel_values" and "Classification" in kind.__name__


def check(models: Sequence[str], others: Mapping[str, object]) -> None:
    """Refuses other models beside classifiers of images, and arguments that say nothing of images, or no images."""
    for name in models:
        if not classifies(name):
            raise ValueError(f"models: '{name}' does not classify images, and others do: measure them apart")
    for name, value in others.items():
        if value:
            raise ValueError(f"{name}={value!r} is for language models, and '{models[0]}' classifies images: give data alone")


@dataclass(frozen=True)
class Images:
    """Images of a source with their labels, as a model's own processor prepares them and its config numbers them.

    Attributes:
        of: The source.
        data: What prepares the images.
        split: The split that they are of.
        numbers: Which images are measured on.
        names: The names of classes by number, where the data holds names.
    """

    of: str
    data: ImageDataModule
    split: str
    numbers: Sequence[int]
    names: Mapping[int, str]


def prepare(
    models: Sequence[str], data: Sequence[str], limit: int | None, batch_size: int, column: str, label_column: str
) -> list[Work]:
    """Reads what classifiers are measured on; returns what measures each of the models.

    Raises:
        ValueError: If there are no such images, or models have other classes.
    """
    built = {name: from_name(name) for name in models}
    classes = {name: model.config.num_labels for name, model in built.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(f"models: they have other classes: {', '.join(f'{name} {count}' for name, count in classes.items())}")
    works: list[Work] = []
    for name in models:
        sets = [_read(name, built[name], source, column, label_column, limit) for source in data]
        works.append(partial(measure, who=name, sets=sets, batch_size=batch_size))
    return works


def _read(name: str, model: PreTrainedModel, source: str, column: str, label_column: str, limit: int | None) -> Images:
    """Reads images of the split `test`, or else `validation`, or the one that there is, as a model is shown them."""
    check_available(source)
    data = ImageDataModule(source, name, column, label_column, validation=0)
    data.read(model)
    split = next(split for split in ("test", "validation", "train") if split in data.splits)
    every: Any = data.splits[split]
    numbers = draw(len(every), len(every) if limit is None else limit)
    names = {number: label for label, number in data.label2id.items()}
    return Images(source, data, split, numbers, names)


def measure(model: PreTrainedModel, who: str, sets: Sequence[Images], batch_size: int) -> tuple[list[Figure], dict[str, Any]]:
    """Measures `acc` and `acc_top5` on all images; returns with them what each image is taken for."""
    figures, answers = list[Figure](), dict[str, Any]()
    for images in sets:
        with progress_bar(f"{who}: {images.of}", "images") as progress:
            answers[images.of] = classified = answered(model, who, images, batch_size, progress)
        for name in ("acc", f"acc_top{TOP}"):
            if name in classified[0]:
                figures.append(_share(images.of, name, [image[name] for image in classified]))
    return figures, {"answers": answers}


def agreements(answers: Mapping[str, Sequence[Any]], first: Mapping[str, Sequence[Any]]) -> list[Figure]:
    """Measures the share of images that a model takes for what the first one does, by source."""
    figures = []
    for of, classified in answers.items():
        same = [int(image["class"] == other["class"]) for image, other in zip(classified, first[of], strict=True)]
        figures.append(_share(of, "agreement", same))
    return figures


def _share(of: str, name: str, each: Sequence[int]) -> Figure:
    return Figure(f"{Path(of).stem} ({len(each)})", name, *mean(each), tuple(each))


@torch.no_grad()
def answered(model: PreTrainedModel, who: str, images: Images, batch_size: int, progress: OnProgress) -> list[dict[str, Any]]:
    """Classifies images.

    Returns:
        Of each image its number in the split, its label and the class that it is taken for, by name where the data holds names,
        and whether the label is that class (`acc`), or among the five likeliest (`acc_top5`, of a model with more than five).
    """
    rows: Any = images.data.splits[images.split]
    collate, classified = images.data.collate(), list[dict[str, Any]]()
    for start in range(0, len(images.numbers), batch_size):
        numbers = images.numbers[start : start + batch_size]
        batch = collate([rows[number] for number in numbers])
        logits = model(pixel_values=batch["pixel_values"].to(model.device, model.dtype)).logits.float().cpu()
        classes = logits.shape[1]
        if not logits.isfinite().all():
            raise ValueError(f"models: '{who}' computes logits that are not finite; its weights have diverged")
        for number, label, scores in zip(numbers, batch["labels"].tolist(), logits, strict=True):
            if not 0 <= label < classes:
                raise ValueError(f"data: '{images.of}' holds the label {label}, and '{who}' has {classes} classes, from 0")
            taken = int(scores.argmax())
            image = {"image": number, "label": images.names.get(label, label), "class": images.names.get(taken, taken)}
            image["acc"] = int(taken == label)
            if classes > TOP:
                image[f"acc_top{TOP}"] = int(label in scores.topk(TOP).indices.tolist())
            classified.append(image)
        progress(len(classified), len(images.numbers))
    return classified
