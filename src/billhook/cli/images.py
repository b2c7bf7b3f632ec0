"""Evaluation of image classifiers: accuracy, top-5 accuracy, and agreement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.assets import model_path
from billhook.calibration.examples import draw
from billhook.calibration.reading import check_available
from billhook.model import from_name, model_class, read_config
from billhook.progress import OnProgress, progress_bar
from billhook.training.evaluation import Figure, mean
from billhook.training.images import ImageDataModule
from billhook.training.metrics import TOP

Result = tuple[list[Figure], dict[str, Any]]
"""Results of a model, and details for the JSON file."""
Work = Callable[[PreTrainedModel], Result]
"""Evaluates a model."""


def classifies(name: str) -> bool:
    """Returns True for the name of an image classifier."""
    path = model_path(name)
    kind = model_class(read_config(path), path)
    return kind.main_input_name == "pixel_values" and "Classification" in kind.__name__


def check(models: Sequence[str], others: Mapping[str, object]) -> None:
    """Raises if not all models are image classifiers, or an argument does not apply to them."""
    for name in models:
        if not classifies(name):
            raise ValueError(f"models: '{name}' is no image classifier, but other models are. Evaluate them separately.")
    for name, value in others.items():
        if value:
            raise ValueError(f"{name}={value!r} is for language models, but '{models[0]}' classifies images. Pass only --data.")


@dataclass(frozen=True)
class Images:
    """Labeled images of a source, prepared for a model.

    Attributes:
        of: The source.
        data: Data module that prepares the images.
        split: The evaluation split.
        numbers: Numbers of the images to evaluate on.
        names: Class names by number, if the data has names.
    """

    of: str
    data: ImageDataModule
    split: str
    numbers: Sequence[int]
    names: Mapping[int, str]


def prepare(
    models: Sequence[str], data: Sequence[str], limit: int | None, batch_size: int, column: str, label_column: str
) -> list[Work]:
    """Loads the evaluation data, and returns a function for each model that evaluates it.

    The images are those of the split `test`, else `validation`, else the only split.

    Raises:
        ValueError: If the images do not exist, or the models have different numbers of classes.
    """
    built, classes = dict[str, PreTrainedModel](), dict[str, int | None]()
    for name in models:
        built[name] = from_name(name)
        classes[name] = built[name].config.num_labels
    if len(set(classes.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in classes.items())
        raise ValueError(f"models: the numbers of classes differ ({counts}). Pass models with the same classes.")
    works: list[Work] = []
    for name in models:
        sets = []
        for source in data:
            check_available(source)
            module = ImageDataModule(source, name, column, label_column, validation=0)
            module.read(built[name])
            split = next(split for split in ("test", "validation", "train") if split in module.splits)
            every: Any = module.splits[split]
            names = {number: label for label, number in module.label2id.items()}
            sets.append(Images(source, module, split, draw(len(every), limit or len(every)), names))
        works.append(partial(measure, who=name, sets=sets, batch_size=batch_size))
    return works


def measure(model: PreTrainedModel, who: str, sets: Sequence[Images], batch_size: int) -> Result:
    """Returns `acc` and `acc_top5` on all images, and the prediction for each image."""
    figures, answers = list[Figure](), dict[str, Any]()
    for images in sets:
        with progress_bar(f"{who}: {images.of}", "images") as progress:
            answers[images.of] = classified = classify(model, who, images, batch_size, progress)
        for name in ("acc", f"acc_top{TOP}"):
            if name in classified[0]:
                figures.append(_share(images.of, name, [image[name] for image in classified]))
    return figures, {"answers": answers}


def agreements(answers: Mapping[str, Sequence[Any]], first: Mapping[str, Sequence[Any]]) -> list[Figure]:
    """Returns the share of images with the same prediction as the first model, by source."""
    figures = []
    for of, classified in answers.items():
        same = [int(image["class"] == other["class"]) for image, other in zip(classified, first[of], strict=True)]
        figures.append(_share(of, "agreement", same))
    return figures


def _share(of: str, name: str, each: Sequence[int]) -> Figure:
    return Figure(f"{Path(of).stem} ({len(each)})", name, *mean(each), tuple(each))


@torch.no_grad()
def classify(model: PreTrainedModel, who: str, images: Images, batch_size: int, progress: OnProgress) -> list[dict[str, Any]]:
    """Classifies images.

    Returns:
        For each image its number in the split, its label, and the predicted class, by name if the data has names, and whether the
        prediction is correct (`acc`) or the label is among the top five (`acc_top5`, with more than five classes).
    """
    rows: Any = images.data.splits[images.split]
    collate, classified = images.data.collate(), list[dict[str, Any]]()
    for start in range(0, len(images.numbers), batch_size):
        numbers = images.numbers[start : start + batch_size]
        batch = collate([rows[number] for number in numbers])
        logits = model(pixel_values=batch["pixel_values"].to(model.device, model.dtype)).logits.float().cpu()
        classes = logits.shape[1]
        if not logits.isfinite().all():
            raise ValueError(f"models: '{who}' computes non-finite logits; its weights have diverged.")
        for number, label, scores in zip(numbers, batch["labels"].tolist(), logits, strict=True):
            if not 0 <= label < classes:
                raise ValueError(f"data: '{images.of}' has the label {label}, but the classes of '{who}' are 0 to {classes - 1}.")
            prediction = int(scores.argmax())
            image = {"image": number, "label": images.names.get(label, label), "class": images.names.get(prediction, prediction)}
            image["acc"] = int(prediction == label)
            if classes > TOP:
                image[f"acc_top{TOP}"] = int(label in scores.topk(TOP).indices.tolist())
            classified.append(image)
        progress(len(classified), len(images.numbers))
    return classified
