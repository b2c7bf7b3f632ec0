"""Versions that are recorded."""

import platform

import torch

from billhook.versions import versions


def test_those_of_packages_that_are_asked_for_and_of_python():
    found = versions("lightning")
    assert list(found) == ["billhook", "torch", "transformers", "lightning", "python"]
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # what it was built for may be left out
    assert found["python"] == platform.python_version()
