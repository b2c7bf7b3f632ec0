"""Finds changes of a config with which a model's class builds given sizes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import Fields, build_on_meta, read_back, with_fields
from billhook.model.shape import Shape, shape_of

Sizes = dict[str, tuple[int, ...]]  # tensor sizes by name


@dataclass(frozen=True)
class Built:
    """A model as its class builds it.

    Attributes:
        tensors: Its tensor sizes.
        attributes: Plain attributes of modules with parameters, such as flags and names.
        shape: Its shape, with the changed config.
    """

    tensors: Sizes
    attributes: dict[str, Any]
    shape: Shape = field(compare=False)

    def difference(self, wanted: Sizes, ignored: Callable[[str], object] = lambda _: False) -> str:
        """Describes the first tensor of another size than wanted. Empty if there is none."""
        for name in [*wanted, *self.tensors]:
            size, size_wanted = self.tensors.get(name), wanted.get(name)
            if size != size_wanted and not ignored(name):
                built = f"{size or 'missing'} in the model that its class then builds"
                return f"{name} is {built}, but {size_wanted or 'missing'} in the pruned model"
        return ""

    def is_between(self, now: "Built | None", wanted: Sizes) -> bool:
        """Returns whether each dimension has its size now or the wanted one."""
        return now is not None and all(
            name in now.tensors and size in itertools.product(*zip(now.tensors[name], wanted.get(name, size), strict=False))
            for name, size in self.tensors.items()
        )


def build(model: PreTrainedModel, fields: Fields) -> Built | None:
    """Builds the class from a changed config, as loaded after saving; None if it is refused."""
    try:
        config = read_back(with_fields(model.config, fields))
    except Exception:  # whatever a class of configs raises
        return None
    return cached(lambda: _build(model, config), (type(model), config), "built")


def _build(model: PreTrainedModel, config: PretrainedConfig) -> Built | None:
    try:
        meta_model = build_on_meta(model, config)
    except Exception:  # whatever a class of models raises
        return None
    attributes: dict[str, Any] = {}
    for name, module in meta_model.named_modules():
        if next(module.parameters(), None) is not None:
            for attribute, value in vars(module).items():
                plain = isinstance(value, bool | int | float | str | None)
                if plain and not attribute.startswith("_") and attribute != "training":
                    attributes[f"{name}.{attribute}"] = value
    shape = shape_of(meta_model)
    return Built(shape.tensors, attributes, shape)


def find_fields(
    model: PreTrainedModel,
    options: Sequence[tuple[str, Any]],
    also: Fields,
    wanted: Sizes,
    fits: Callable[[Built], bool],
    together: int = 3,
    refused: bool = True,
) -> Iterator[Fields]:
    """Yields changed fields with which the class builds a fitting model, fewest first.

    Args:
        model: The model, as its class builds it.
        options: Fields and their new values.
        also: Fields that change in any case.
        wanted: Tensor sizes. Pairs contain no option that alone changes nothing, or gives a tensor a third size.
        fits: Whether a built model is as wanted.
        together: Largest number of options that change together.
        refused: Whether pairs may contain an option that the class refuses alone.
    """
    now = build(model, {})
    if (unchanged := build(model, also)) is not None and fits(unchanged):
        yield also
    alone: list[tuple[tuple[str, Any], Built | None]] = []
    for name, value in options:
        built = build(model, also | {name: value})
        alone.append(((name, value), built))
        if built is not None and fits(built):
            yield also | {name: value}
    if unchanged is None and not refused:  # 8 -> 6 heads of a hidden size of 256 need another hidden size first
        for (name, value), built in alone:
            if built is not None and built.is_between(now, wanted):
                yield from find_fields(model, options, also | {name: value}, wanted, fits, together - 1, refused)
    if refused and any(built is None for _, built in alone):
        unchanged = None  # a class that refuses an option may need one that changes nothing alone
    useful = []
    for option, built in alone:
        if refused if built is None else built != unchanged and built.is_between(now, wanted):
            useful.append(option)
    for number in range(2, together + 1):
        for fields in map(dict, itertools.combinations(useful, number)):
            if len(fields) == number and (built := build(model, also | fields)) is not None and fits(built):
                yield also | fields
