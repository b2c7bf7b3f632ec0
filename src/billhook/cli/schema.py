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
    own = {"model": (pl.LightningModule, billhook.TransformerModule), "data": (pl.LightningDataModule, billhook.TextDataModule)}
    parts = {
        name: {"if": NAMES_CLASS, "then": made.chosen(of), "else": made.arguments(usual)} for name, (of, usual) in own.items()
    }
    known: Schema = {
        "seed_everything": {"type": ["boolean", "integer"]},
        "trainer": made.arguments(pl.Trainer),
        **parts,
        "ckpt_path": {"type": ["string", "null"]},
        "weights_only": {"type": ["boolean", "null"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A config of `billhook fit`, or a fragment of one",
        "type": "object",
        "properties": known,
        "additionalProperties": False,
        "$defs": dict(sorted(made.found.items())),
    }


NAMES_CLASS: Schema = {"required": ["class_path"]}


class Definitions:
    """Schemas of classes, each described once."""

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}

    def arguments(self, of: type) -> Schema:
        """Describes the arguments of a class, as a mapping."""
        if (name := path_of(of)) not in self.found:
            self.found[name] = {}  # it may be among its own arguments
            self.found[name] |= self._arguments(of)
        return {"$ref": f"#/$defs/{name}"}

    def _arguments(self, of: type) -> Schema:
        hints, text = get_type_hints(of.__init__), parse(of.__doc__ or "")  # type: ignore[misc]
        told = {one.arg_name: one.description for one in [*text.params, *parse(of.__init__.__doc__ or "").params]}  # type: ignore[misc]
        given = inspect.signature(of).parameters.values()
        named = [one for one in given if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        properties: Schema = {}
        for one in named:
            schema = self.value(hints.get(one.name, Any))
            says = " ".join((told.get(one.name) or "").split())
            properties[one.name] = schema | ({"description": says} if says else {})
            if "array" in str(schema) or one.name == "callbacks":
                properties[f"{one.name}+"] = properties[one.name]
        needed = [one.name for one in named if one.default is one.empty]
        about = {"description": text.short_description} if text.short_description else {}
        shape = {"type": "object", "properties": properties, "additionalProperties": len(named) < len(given)}
        return about | shape | ({"required": needed} if needed else {})

    def chosen(self, of: type) -> Schema:
        """Describes a class that is chosen by `class_path`, or by its path alone, of those that are some class, and others."""
        if (name := f"class:{path_of(of)}") not in self.found:
            self.found[name] = {}
            own = {one: path_of(one) for one in public_classes(of)}
            cases = [(sorted({path, path.rpartition(".")[2]}), one) for one, path in own.items()]
            words = sorted(word for names, _ in cases for word in names)
            words += pl.callbacks.__all__ if of is pl.Callback else []
            path: Schema = {"anyOf": [{"enum": words}, {"type": "string", "pattern": OTHERS}]}
            spec: Schema = {"type": "object", "required": ["class_path"], "additionalProperties": False}
            spec["properties"] = {"class_path": path, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
            spec["allOf"] = [self._case(names, one) for names, one in cases]
            self.found[name] |= {"if": {"type": "object"}, "then": spec, "else": path}
        return {"$ref": f"#/$defs/{name}"}

    def _case(self, names: list[str], one: type) -> Schema:
        is_it = {"properties": {"class_path": {"enum": names}}, "required": ["class_path"]}
        return {"if": is_it, "then": {"properties": {"init_args": self.arguments(one)}}}

    def value(self, kind: Any) -> Schema:  # noqa: ANN401 - annotations are of no class
        """Describes the values of an annotation."""
        origin, inside = get_origin(kind), get_args(kind)
        if kind in PLAIN:
            return {"type": PLAIN[kind]}
        if origin is Literal:
            return {"enum": list(inside)}
        if origin in (Union, UnionType):
            kinds = (one for one in inside if one is not Any)  # which is what only Python gives, beside what YAML does
            return {"anyOf": sorted((self.value(one) for one in kinds), key=json.dumps)}  # typing keeps no order of its own
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
            return chosen if inspect.isabstract(kind) else {"if": _own_arguments(), "then": self.arguments(kind), "else": chosen}
        return {"type": ["string", "object"]}


def _own_arguments() -> Schema:
    """Returns what holds of a mapping of a class's own arguments."""
    return {"type": "object", "not": NAMES_CLASS}


def path_of(one: type) -> str:
    """Returns the shortest path of a class that YAML takes."""
    for space in (billhook, billhook.criteria, billhook.importance, billhook.kv_methods, billhook.training):
        if getattr(space, one.__name__, None) is one:
            return f"{space.__name__}.{one.__name__}"
    return re.sub(r"^lightning\.pytorch\..*", "lightning.pytorch", one.__module__) + f".{one.__name__}"


def public_classes(of: type) -> list[type]:
    """Returns billhook's classes that are some class, can be made, and are meant to be, by path; those of commands are not."""
    return sorted((one for one in subclasses(of) if _is_public(one)), key=lambda one: (one.__module__, one.__name__))


def _is_public(one: type) -> bool:
    ours = one.__module__.startswith("billhook.") and not one.__module__.startswith("billhook.cli.")
    return ours and not _is_abstract(one) and not one.__name__.startswith("_")


def _is_abstract(one: type) -> bool:
    """Tells whether a class has an abstract method, also where its metaclass does not know."""
    return any(getattr(getattr(one, name, None), "__isabstractmethod__", False) for name in dir(one))


def schema() -> None:
    """Prints a JSON Schema of the configs of `billhook fit`, by which editors complete and check YAML.

    `billhook schema > billhook.schema.json`, and in the first line of a config beside it:
    `# yaml-language-server: $schema=billhook.schema.json`. Recipes of the installed package lie beside theirs.
    """
    print(json.dumps(config_schema(), indent=1))
