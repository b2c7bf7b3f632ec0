"""Versions that are recorded."""

import platform

import torch

import billhook.versions as module
from billhook.versions import versions


def test_those_of_packages_that_are_asked_for_and_of_python():
    found = versions("lightning")
    assert list(found) == ["billhook", "torch", "transformers", "lightning", "python"]
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # what it was built for may be left out
    assert found["python"] == platform.python_version()


def test_of_what_is_not_installed_nothing_is_said(monkeypatch):
    def version(name):
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", version)
    assert versions() == {"python": platform.python_version()}
