"""`billhook schema`: a JSON Schema of configs, for editors."""

import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
from docstring_parser import parse

import billhook
from billhook.model.plan import subclasses

Schema = dict[str, Any]
PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", NoneType: "null"}
ARRAYS: tuple[Any, ...] = (list, tuple, set, Sequence, Iterable, Collection)
OPEN = (pl.Callback, pl.LightningModule, pl.LightningDataModule)
"""Classes of others of which billhook has some."""
OTHERS = r"^(?!billhook\.\w+$)\w+(\.\w+)+$"
"""Paths of classes that are none of billhook's public ones."""


def config_schema() -> Schema:
    """Returns the schema of a config (JSON Schema, draft 2020-12).

    jsonargparse can describe a parser too (from 4.53 on); of this one it makes 5 MB, with every `nn.Module` there is, and it
    knows neither `callbacks+` nor short names.
    """
    made = Definitions()

    def part(base: type, default: type) -> Schema:
        return {"if": NAMES_CLASS, "then": made.chosen(base), "else": made.arguments(default)}

    known: Schema = {
        "seed_everything": {"type": ["boolean", "integer"]},
        "trainer": made.arguments(pl.Trainer),
        "model": part(pl.LightningModule, billhook.TransformerModule),
        "data": part(pl.LightningDataModule, billhook.TextDataModule),
        "ckpt_path": {"type": ["string", "null"]},
        "weights_only": {"type": ["boolean", "null"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A config of `billhook fit`, or a fragment of one",
        "type": "object",
        "properties": known,
        "additionalProperties": False,
        "$defs": dict(sorted(made.schemas.items())),
    }


NAMES_CLASS: Schema = {"required": ["class_path"]}


class Definitions:
    """Schemas of classes, each described once."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def arguments(self, of: type) -> Schema:
        """Describes the arguments of a class, as a mapping."""
        if (name := path_of(of)) not in self.schemas:
            self.schemas[name] = {}  # it may be among its own arguments
            self.schemas[name] |= self._arguments(of)
        return {"$ref": f"#/$defs/{name}"}

    def _arguments(self, of: type) -> Schema:
        hints, text = get_type_hints(of.__init__), parse(of.__doc__ or "")  # type: ignore[misc]
        descriptions = {param.arg_name: param.description for param in [*text.params, *parse(of.__init__.__doc__ or "").params]}  # type: ignore[misc]
        properties: Schema = {}
        needed, open_ended = list[str](), False
        for name, parameter in inspect.signature(of).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                open_ended = True
                continue
            schema = self.value(hints.get(name, Any))
            says = " ".join((descriptions.get(name) or "").split())
            properties[name] = schema | ({"description": says} if says else {})
            if "array" in str(schema) or name == "callbacks":
                properties[f"{name}+"] = properties[name]
            if parameter.default is parameter.empty:
                needed.append(name)
        about = {"description": text.short_description} if text.short_description else {}
        shape = {"type": "object", "properties": properties, "additionalProperties": open_ended}
        return about | shape | ({"required": needed} if needed else {})

    def chosen(self, of: type) -> Schema:
        """Describes a class that is chosen by `class_path`, or by its path alone, of those that are some class, and others."""
        if (name := f"class:{path_of(of)}") not in self.schemas:
            self.schemas[name] = {}
            words, cases = list[str](), list[Schema]()
            for kind in public_classes(of):
                names = sorted({path_of(kind), kind.__name__})
                words += names
                is_it = {"properties": {"class_path": {"enum": names}}, "required": ["class_path"]}
                cases.append({"if": is_it, "then": {"properties": {"init_args": self.arguments(kind)}}})
            words.sort()
            words += pl.callbacks.__all__ if of is pl.Callback else []
            path: Schema = {"anyOf": [{"enum": words}, {"type": "string", "pattern": OTHERS}]}
            spec: Schema = {"type": "object", "required": ["class_path"], "additionalProperties": False}
            spec["properties"] = {"class_path": path, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
            spec["allOf"] = cases
            self.schemas[name] |= {"if": {"type": "object"}, "then": spec, "else": path}
        return {"$ref": f"#/$defs/{name}"}

    def value(self, kind: Any) -> Schema:  # noqa: ANN401 - annotations are of no class
        """Describes the values of an annotation."""
        origin, inside = get_origin(kind), get_args(kind)
        if kind in PLAIN:
            return {"type": PLAIN[kind]}
        if origin is Literal:
            return {"enum": list(inside)}
        if origin in (Union, UnionType):
            schemas = [self.value(member) for member in inside if member is not Any]  # `Any` is for Python; YAML gives the others
            return {"anyOf": sorted(schemas, key=json.dumps)}  # typing keeps no order of its own
        if origin in ARRAYS:
            return {"type": "array"} | ({"items": self.value(inside[0])} if inside else {})
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.value(inside[1])}
        if not isinstance(kind, type):
            return {}
        if kind in OPEN:
            return self.chosen(kind)
        if kind.__module__.startswith("billhook."):
            chosen = self.chosen(kind)
            arguments: Schema = {"type": "object", "not": NAMES_CLASS}
            return chosen if inspect.isabstract(kind) else {"if": arguments, "then": self.arguments(kind), "else": chosen}
        return {"type": ["string", "object"]}


def path_of(kind: type) -> str:
    """Returns the shortest path of a class that YAML takes."""
    for space in (billhook, billhook.criteria, billhook.importance, billhook.kv_methods, billhook.training):
        if getattr(space, kind.__name__, None) is kind:
            return f"{space.__name__}.{kind.__name__}"
    return re.sub(r"^lightning\.pytorch\..*", "lightning.pytorch", kind.__module__) + f".{kind.__name__}"


def public_classes(of: type) -> list[type]:
    """Returns billhook's classes that are some class, can be made, and are meant to be, by path; those of commands are not."""
    return sorted(filter(_is_public, subclasses(of)), key=lambda kind: (kind.__module__, kind.__name__))


def _is_public(kind: type) -> bool:
    if (
        not kind.__module__.startswith("billhook.")
        or kind.__module__.startswith("billhook.cli.")
        or kind.__name__.startswith("_")
    ):
        return False
    # also where the metaclass is no ABCMeta, which would know
    return not any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def schema() -> None:
    """Prints a JSON Schema of the configs of `billhook fit`, by which editors complete and check YAML.

    `billhook schema > billhook.schema.json`, and in the first line of a config beside it:
    `# yaml-language-server: $schema=billhook.schema.json`. Recipes of the installed package lie beside theirs.
    """
    print(json.dumps(config_schema(), indent=1))
