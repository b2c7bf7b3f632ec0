"""Arguments are refused in one voice."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
from torch import nn
from typing_extensions import TypeAliasType

from billhook.arguments import check_fraction, check_int, check_number, check_one_of, check_path, check_types

LEGAL = [
    lambda: check_int("n", 1),
    lambda: check_int("n", 0, least=0),
    lambda: check_number("x", 0.5),
    lambda: check_number("x", 0, least=0),
    lambda: check_number("x", 1e-9, above=0),
    lambda: check_fraction("x", 0),
    lambda: check_fraction("x", 0.999),
    lambda: check_fraction("x", 1, "(0, 1]"),
    lambda: check_fraction("x", 0.5, "[0, 0.5]"),
    lambda: check_one_of("x", "a", Literal["a", "b"]),
    lambda: check_one_of("x", None, ("a", None)),
    lambda: check_one_of("x", "a", {"a": 1}),
    lambda: check_path("folder", "out"),
    lambda: check_path("picture", Path("a/b.PNG"), [".png"]),
]
REFUSED = {
    "folder=None must be a path": lambda: check_path("folder", None),
    "folder='' must be a path": lambda: check_path("folder", ""),
    "picture='x.foo' must be a path that ends in .png, .pdf": lambda: check_path("picture", "x.foo", [".png", ".pdf"]),
    "n=0 must be a whole number of at least 1": lambda: check_int("n", 0),
    "n=True must be a whole number of at least 1": lambda: check_int("n", True),
    "n='3' must be a whole number of at least 0": lambda: check_int("n", "3", 0),
    "x=-1 must be a number of at least 0": lambda: check_number("x", -1, least=0),
    "x=0 must be a number above 0": lambda: check_number("x", 0, above=0),
    "x=nan must be a number": lambda: check_number("x", float("nan")),
    "x=1.0 must be in [0, 1)": lambda: check_fraction("x", 1.0),
    "x=0 must be in (0, 1]": lambda: check_fraction("x", 0, "(0, 1]"),
    "x=nan must be a fraction of the weights in [0, 1)": lambda: check_fraction("x", float("nan"), of="the weights"),
    "x=True must be in [0, 1)": lambda: check_fraction("x", True),
    "x=30 must be in [0, 1); did you mean 0.3?": lambda: check_fraction("x", 30),
    "x=100 must be in (0, 1]; did you mean 1?": lambda: check_fraction("x", 100, "(0, 1]"),
    "x=60 must be in [0, 0.5]": lambda: check_fraction("x", 60, "[0, 0.5]"),
    "x='c' must be one of a, b": lambda: check_one_of("x", "c", Literal["a", "b"]),
}


@pytest.mark.parametrize("asked", LEGAL)
def test_what_is_legal_passes(asked):
    asked()


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_is_refused(said):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        REFUSED[said]()
    assert str(error.value) == said


def trained(
    model: nn.Module, by: Literal["adam"] | float = 0.5, units: Mapping[str, Iterable[int]] | None = None, log: bool = False
):
    check_types(trained, locals())


NET = nn.Linear(1, 1)
ANNOTATED = {
    "model='gpt2' must be a Module": lambda: trained("gpt2"),
    "by='sgd' must be one of adam or a number": lambda: trained(NET, "sgd"),
    "by=nan must be one of adam or a number": lambda: trained(NET, float("nan")),
    "by=True must be one of adam or a number": lambda: trained(NET, True),
    "units=[0] must be a Mapping[str, Iterable[int]] or None": lambda: trained(NET, units=[0]),
    "units={'a': 1} must be a Mapping[str, Iterable[int]] or None": lambda: trained(NET, units={"a": 1}),
    "log=1 must be True or False": lambda: trained(NET, log=1),
}


@pytest.mark.parametrize("said", ANNOTATED)
def test_what_an_annotation_does_not_allow_is_refused(said):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        ANNOTATED[said]()
    assert str(error.value) == said


def test_what_annotations_allow_passes():
    trained(NET)
    trained(NET, "adam", {"a": [0], "b": iter([1])}, log=True)
    trained(NET, 1, {"a": (True, "0")})  # which numbers these are is said by who reads them


class Lazy(Mapping):
    """Values that are read when they are asked for, as those in files."""

    def __getitem__(self, name):
        raise AssertionError("it is read")

    def __iter__(self):
        return iter(["a"])

    def __len__(self):
        return 1


def test_values_that_must_be_read_are_not():
    trained(NET, units=Lazy())


def test_aliases_that_are_classes_of_no_value():
    """As numpy 2.5 has `NDArray` from Python 3.12 on."""
    kind = TypeVar("kind", bound=np.generic)
    table = TypeAliasType("table", np.ndarray[Any, np.dtype[kind]], type_params=(kind,))
    words = TypeAliasType("words", list[str])

    def given(index, names):
        check_types(given, locals())

    given.__annotations__ = {"index": table[np.int64], "names": words | None}
    given(np.arange(3), None)
    given(np.arange(3), ["a"])
    with pytest.raises(ValueError, match=r"index=\[0\] must be a table"):
        given([0], None)
    with pytest.raises(ValueError, match=r"names=\[3\] must be a words or None"):
        given(np.arange(3), [3])
