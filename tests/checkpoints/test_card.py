"""The model card beside a checkpoint says what its record says."""

import json
import os

import pytest
import transformers
from huggingface_hub import ModelCard

import billhook as bh
from billhook.checkpoints.card import hub_name
from kit.families import llama

SIZES = {"params": 1000, "zeros": 0, "kv_cache_bytes": None, "flops": 20}
EVENTS = [
    {"step": 2, "what": "4 -> 2 KV heads (mean)", "before": SIZES, "after": SIZES | {"params": 900}},
    {
        "step": 3,
        "what": "a|b\nc",
        "before": {},
        "after": SIZES | {"params": 800, "zeros": 12},
        "settled": [{"says": "chosen on 8 of 8 batches"}, "of another hand"],
    },
]
DAMAGE = [
    {
        "source": "a",
        "inside": True,
        "before": 25.44,
        "after": 31.33,
        "ratio": 1.2315,
        "ratio_error": 0.01,
        "kl": 0.2,
        "kl_error": 0.02,
    },
    {
        "source": "b",
        "inside": False,
        "before": 2e4,
        "after": 3e4,
        "ratio": 1.5,
        "ratio_error": "nan",
        "kl": "nan",
        "kl_error": "nan",
    },
]


def saved(folder, record=None):
    bh.save(llama(), folder / "small", record=record)
    return (folder / "small" / "README.md").read_text() if record else None


def test_what_was_done_what_it_costs_and_how_to_load_it(tmp_path):
    text = saved(tmp_path, {"steps": 8, "events": EVENTS, "damage": DAMAGE})
    body = text.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line][:12] == [
        "# small",
        "## What was done",
        "- step 2: 4 -> 2 KV heads (mean)",
        "- step 3: a\\|b c",
        "  - chosen on 8 of 8 batches",
        "- training, 8 steps",
        "|  | before | after |",
        "| --- | ---: | ---: |",
        "| parameters | 1,000 | 800 |",
        "| of them zero | 0 | 12 |",
        "| forward FLOPs per token | 20 | 20 |",
        "## What it costs",
    ]
    assert "| a | calibrated on | 25.44 | 31.33 | 1.232 ± 0.010 | 0.200 ± 0.020 |" in body
    assert "| b | not calibrated on | 2e+04 | 3e+04 | 1.500 | unknown |" in body
    assert "It is an ordinary Hugging Face checkpoint: plain from_pretrained loads it, without billhook." in body


def test_metadata_as_the_hub_reads_it(tmp_path):
    model = llama()
    model.config._name_or_path = "owner/dense"
    bh.save(model, tmp_path / "small", record={"steps": 1})
    read = ModelCard.load(tmp_path / "small" / "README.md").data.to_dict()
    assert read == {"base_model": "owner/dense", "library_name": "transformers", "tags": ["billhook"]}
    assert json.loads((tmp_path / "small" / "billhook.json").read_text())["base_model"] == "owner/dense"
    bh.save(bh.load(tmp_path / "small"), tmp_path / "smaller", record={"steps": 1})
    assert "base_model" not in (tmp_path / "smaller" / "README.md").read_text()  # a folder is none of the hub's


def test_of_a_family_of_the_users_own(tmp_path):
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    model = OwnForCausalLM(OwnConfig.from_dict({**llama().config.to_dict(), "model_type": "own"}))
    bh.save(model, tmp_path / "small", record={"steps": 1})
    assert "unknown: OwnForCausalLM was not looked up" in (tmp_path / "small" / "README.md").read_text()


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/1")
    assert [hub_name(name) for name in ("gpt2", "owner/model")] == ["gpt2", "owner/model"]
    assert [hub_name(name) for name in ("", "runs/1", "runs/1/model", "/work/model", "../model")] == [None] * 5


def test_an_earlier_checkpoint_with_a_card_is_replaced_also_by_one_without(tmp_path):
    saved(tmp_path, {"steps": 8})
    record = json.loads((tmp_path / "small" / "billhook.json").read_text())
    assert sorted(record["files"]) == sorted(os.listdir(tmp_path / "small"))
    assert "What it costs" not in saved(tmp_path, {"note": "unchanged"})
    saved(tmp_path)
    assert not (tmp_path / "small" / "README.md").exists()


@pytest.mark.parametrize("anything", [None, 3, "x", [1, "x", {}], {"a": 1}, [{"what": 1, "before": 2, "after": None}]])
def test_a_record_of_ones_own_may_hold_anything(tmp_path, anything):
    text = saved(tmp_path, dict.fromkeys(("events", "damage", "steps", "accuracy", "base_model"), anything))
    assert "## How to load it" in text
    assert "Made of" not in text or anything == "x"
