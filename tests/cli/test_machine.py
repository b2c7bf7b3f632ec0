"""Where commands compute."""

import pytest
import torch

from billhook.cli.machine import device_of


def accelerators(found, available):
    """Stands in for torch built for an accelerator, whose driver works or does not."""

    def current_accelerator(check_available=False):
        return torch.device(found) if available or not check_available else None

    return current_accelerator


@pytest.mark.parametrize(("available", "place"), [(True, "cuda"), (False, "cpu")])
def test_an_accelerator_is_taken_where_its_driver_works(monkeypatch, available, place):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerators("cuda", available))
    assert device_of("auto").type == place


def test_an_accelerator_without_float64_is_taken_by_name_alone(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerators("mps", available=True))  # there is none here
    assert device_of("auto").type == "cpu"


def test_a_device_that_is_no_device_is_refused():
    with pytest.raises(ValueError, match="device='gpu'"):
        device_of("gpu")
