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
SCALARS: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", NoneType: "null"}
ARRAYS: tuple[Any, ...] = (list, tuple, set, Sequence, Iterable, Collection)
OPEN = (pl.Callback, pl.LightningModule, pl.LightningDataModule)
"""Lightning's base classes, of which users write subclasses."""
OTHER_CLASSES = r"^(?!billhook\.\w+$)\w+(\.\w+)+$"
"""Pattern of class paths outside billhook's public names."""


def config_schema() -> Schema:
    """Returns the schema of a config (JSON Schema, draft 2020-12).

    jsonargparse (from 4.53) can also describe a parser. For this one it returns 5 MB with every `nn.Module`, and it supports
    neither `callbacks+` nor short class names.
    """
    definitions = Definitions()

    def part(base: type, default: type) -> Schema:
        return {"if": HAS_CLASS_PATH, "then": definitions.class_choice(base), "else": definitions.arguments(default)}

    properties: Schema = {
        "seed_everything": {"type": ["boolean", "integer"]},
        "trainer": definitions.arguments(pl.Trainer),
        "model": part(pl.LightningModule, billhook.TransformerModule),
        "data": part(pl.LightningDataModule, billhook.TextDataModule),
        "ckpt_path": {"type": ["string", "null"]},
        "weights_only": {"type": ["boolean", "null"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A config of `billhook fit`, or part of one",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.schemas.items())),
    }


HAS_CLASS_PATH: Schema = {"required": ["class_path"]}


class Definitions:
    """Schemas of classes, each defined once."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def arguments(self, of: type) -> Schema:
        """Describes the arguments of a class, as a mapping."""
        if (name := path_of(of)) not in self.schemas:
            self.schemas[name] = {}  # set first, as a class may be an argument of itself
            self.schemas[name] |= self._arguments(of)
        return {"$ref": f"#/$defs/{name}"}

    def _arguments(self, of: type) -> Schema:
        hints, docstring = get_type_hints(of.__init__), parse(of.__doc__ or "")  # type: ignore[misc]
        params = [*docstring.params, *parse(of.__init__.__doc__ or "").params]  # type: ignore[misc]
        descriptions = {param.arg_name: " ".join((param.description or "").split()) for param in params}
        properties: Schema = {}
        required, open_ended = list[str](), False
        for name, parameter in inspect.signature(of).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                open_ended = True
                continue
            schema = self.value(hints.get(name, Any))
            description = descriptions.get(name)
            properties[name] = schema | ({"description": description} if description else {})
            if "array" in str(schema) or name == "callbacks":
                properties[f"{name}+"] = properties[name]
            if parameter.default is parameter.empty:
                required.append(name)
        about = {"description": docstring.short_description} if docstring.short_description else {}
        schema = {"type": "object", "properties": properties, "additionalProperties": open_ended}
        return about | schema | ({"required": required} if required else {})

    def class_choice(self, of: type) -> Schema:
        """Describes the choice of a subclass, by `class_path` and `init_args` or as a path."""
        if (name := f"class:{path_of(of)}") not in self.schemas:
            self.schemas[name] = {}
            paths, cases = list[str](), list[Schema]()
            for kind in public_classes(of):
                names = sorted({path_of(kind), kind.__name__})
                paths += names
                is_kind = {"properties": {"class_path": {"enum": names}}, "required": ["class_path"]}
                cases.append({"if": is_kind, "then": {"properties": {"init_args": self.arguments(kind)}}})
            paths.sort()
            paths += pl.callbacks.__all__ if of is pl.Callback else []
            path: Schema = {"anyOf": [{"enum": paths}, {"type": "string", "pattern": OTHER_CLASSES}]}
            spec: Schema = {"type": "object", "required": ["class_path"], "additionalProperties": False}
            spec["properties"] = {"class_path": path, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
            spec["allOf"] = cases
            self.schemas[name] |= {"if": {"type": "object"}, "then": spec, "else": path}
        return {"$ref": f"#/$defs/{name}"}

    def value(self, kind: Any) -> Schema:  # noqa: ANN401 - annotations have no common class
        """Describes the legal values of an annotation."""
        origin, inside = get_origin(kind), get_args(kind)
        if kind in SCALARS:
            return {"type": SCALARS[kind]}
        if origin is Literal:
            return {"enum": list(inside)}
        if origin in (Union, UnionType):
            schemas = [self.value(member) for member in inside if member is not Any]  # YAML gives no objects
            return {"anyOf": sorted(schemas, key=json.dumps)}  # typing does not keep an order
        if origin in ARRAYS:
            return {"type": "array"} | ({"items": self.value(inside[0])} if inside else {})
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.value(inside[1])}
        if not isinstance(kind, type):
            return {}
        if kind in OPEN:
            return self.class_choice(kind)
        if kind.__module__.startswith("billhook."):
            choice = self.class_choice(kind)
            arguments: Schema = {"type": "object", "not": HAS_CLASS_PATH}
            return choice if inspect.isabstract(kind) else {"if": arguments, "then": self.arguments(kind), "else": choice}
        return {"type": ["string", "object"]}


def path_of(kind: type) -> str:
    """Returns the shortest legal path of a class in YAML."""
    for space in (billhook, billhook.criteria, billhook.importance, billhook.kv_methods, billhook.training):
        if getattr(space, kind.__name__, None) is kind:
            return f"{space.__name__}.{kind.__name__}"
    return re.sub(r"^lightning\.pytorch\..*", "lightning.pytorch", kind.__module__) + f".{kind.__name__}"


def public_classes(of: type) -> list[type]:
    """Returns billhook's public, concrete subclasses of a class by path, without commands."""
    return sorted(filter(_is_public, subclasses(of)), key=lambda kind: (kind.__module__, kind.__name__))


def _is_public(kind: type) -> bool:
    module = kind.__module__
    if not module.startswith("billhook.") or module.startswith("billhook.cli.") or kind.__name__.startswith("_"):
        return False
    # `inspect.isabstract` needs the metaclass ABCMeta, which not all of these classes have
    return not any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def schema() -> None:
    """Prints a JSON Schema of `billhook fit` configs for editors.

    Run `billhook schema > billhook.schema.json`, and start a config in the same folder with
    `# yaml-language-server: $schema=billhook.schema.json`. Packaged recipes already have a schema.
    """
    print(json.dumps(config_schema(), indent=1))
