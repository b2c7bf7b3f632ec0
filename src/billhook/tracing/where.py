"""Finds the module at work and the line of its code, for messages."""

import os
import sys
import traceback
from pathlib import Path
from types import CodeType

import torch
from torch import nn

NOT_THE_MODELS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders whose code is not the code of the model that runs."""


def where(model: nn.Module) -> str:
    """Finds the innermost module of a model that is running, and the line of its code."""
    line = None
    for frame, number in traceback.walk_stack(sys._getframe()):
        line = line or _line(frame.f_code, number)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (name := _name(model, owner)) is not None:
            return f"{name} ({line})" if line else name
    return line or "the model"


def line_of(error: BaseException) -> str | None:
    """Finds the innermost line of a model's code that an error came through."""
    lines = [_line(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    return next((line for line in reversed(lines) if line), None)


def _line(code: CodeType, number: int) -> str | None:
    return None if code.co_filename.startswith(NOT_THE_MODELS) else f"{Path(code.co_filename).name}:{number}"


def _name(model: nn.Module, module: nn.Module) -> str | None:
    return next((name or type(model).__name__ for name, own in model.named_modules() if own is module), None)
