"""Names of models that are neither here nor on the Hub: asked for once, and refused in a sentence."""

import time

import huggingface_hub
import pytest

from billhook.model.meta import read_config
from kit.fits import llama
from kit.shards import endpoint, shelf


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    def waits(seconds):
        raise AssertionError(f"it waits for {seconds} s")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", waits)


def test_offline_no_hub_is_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no folder 'own/model' here, and no model .* downloaded .*HF_HUB_OFFLINE is set: name"):
        read_config("own/model")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name, value in endpoint("http://127.0.0.1:9").items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    with pytest.raises(ValueError, match=r"no folder 'own/model' here, and the Hub cannot be asked .*: name a fold"):
        read_config("own/model")


def test_a_name_that_the_hub_does_not_have(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with (
        shelf(tmp_path / "empty", monkeypatch, tmp_path / "cache") as held,
        pytest.raises(ValueError, match="no folder 'own/model' here, and the Hub has no model of that name"),
    ):
        read_config("own/model")
    assert held.asked == []


def test_one_that_it_has_is_read_and_then_found_in_the_cache_without_the_hub(tmp_path, monkeypatch):
    llama().config.save_pretrained(tmp_path / "served")
    with shelf(tmp_path / "served", monkeypatch, tmp_path / "cache"):
        width = read_config("own/model").hidden_size
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_config("own/model").hidden_size == width


def test_what_can_be_no_name():
    with pytest.raises(ValueError, match=r"no folder 'my model' here, and no model of the Hub can have such a name: name a fold"):
        read_config("my model")
