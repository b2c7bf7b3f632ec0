"""The model card beside a checkpoint says what its record says."""

import json
from importlib import metadata

import pytest
import transformers
from huggingface_hub import ModelCard

import billhook as bh
from kit.families import llama

SIZES = {"params": 1000, "zeros": 0, "kv_cache_bytes": None, "flops": 20}
EVENTS = [
    {"step": 2, "what": "4 -> 2 KV heads (mean)", "before": SIZES, "after": SIZES | {"params": 900}},
    {
        "step": 3,
        "what": "a|b\nc",
        "before": {},
        "after": SIZES | {"params": 800, "zeros": 12},
        "not_refitted": "linears that keep more inputs than there are tokens",
    },
]
DEGRADATION = [
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
    return (folder / "small" / "README.md").read_text()


def front(folder):
    """What the hub reads of a card."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_what_was_done_what_it_costs_and_how_to_load_it(tmp_path):
    text = saved(tmp_path, {"steps": 8, "events": EVENTS, "degradation": DEGRADATION})
    body = text.split("---\n", 2)[2]
    lines = [line for line in body.splitlines() if line]
    assert lines[:8] == [
        "# LlamaForCausalLM, pruned with billhook",
        "## Changes",
        "- step 2: 4 -> 2 KV heads (mean)",
        "- step 3: a\\|b c",
        "  - linears that keep more inputs than there are tokens",
        "- 8 training steps",
        "| by | settings |",
        "| --- | --- |",
    ]
    torch = metadata.version("torch")
    assert lines[8].startswith(f"| versions | billhook {bh.__version__}; torch {torch}; transformers ")
    assert lines[9:16] == [
        "See `billhook.json` for the complete record, such as the removed units.",
        "|  | before | after |",
        "| --- | ---: | ---: |",
        "| parameters | 1,000 | 800 |",
        "| zero parameters | 0 | 12 |",
        "| FLOPs per token or image | 20 | 20 |",
        "## Size and quality",
    ]
    assert "| a | calibrated on | 25.44 | 31.33 | 1.232 ± 0.010 | 0.200 ± 0.020 |" in body
    assert "| b | not calibrated on | 2e+04 | 3e+04 | 1.500 | unknown |" in body
    assert "Standard checkpoint: from_pretrained loads it." in body


def test_metadata_as_the_hub_reads_it(tmp_path):
    model = llama()
    model.config._name_or_path = "owner/dense"
    bh.save(model, tmp_path / "small", record={"steps": 1})
    read = front(tmp_path / "small")
    plain = {"library_name": "transformers", "tags": ["billhook"]}
    assert read == {"base_model": "owner/dense", "base_model_relation": "finetune"} | plain
    assert json.loads((tmp_path / "small" / "billhook.json").read_text())["base_model"] == "owner/dense"
    bh.save(bh.load(tmp_path / "small"), tmp_path / "smaller", record={"steps": 1})
    assert front(tmp_path / "smaller")["base_model"] == "owner/dense"  # which the folder was made of
    llama().save_pretrained(tmp_path / "another")
    bh.save(bh.load(tmp_path / "another"), tmp_path / "third", record={"steps": 1})
    assert front(tmp_path / "third") == plain  # a folder is none of the hub's


def test_the_folder_that_it_was_made_of_is_named_without_its_place(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    bh.save(bh.load(tmp_path / "dense"), tmp_path / "small", record={"events": EVENTS})
    bh.save(bh.load(tmp_path / "small"), tmp_path / "smaller")  # goes back to the first
    for name, done, size in (("small", "pruned", ", 1,000 parameters"), ("smaller", "saved", "")):
        text, record = (tmp_path / name / "README.md").read_text(), json.loads((tmp_path / name / "billhook.json").read_text())
        assert f"# dense, {done} with billhook\n\nMade from a local folder, dense (LlamaForCausalLM{size}).\n" in text
        assert record["made_of"] == {"name": "dense", "class": "LlamaForCausalLM"}
        assert record["saved"]["folder"] == name
        assert str(tmp_path) not in text + json.dumps(record)


def test_a_model_from_the_cache_of_the_hub_is_named_as_there(tmp_path):
    folder = tmp_path / "models--owner--dense" / "snapshots" / "0123abc"
    llama().save_pretrained(folder)
    bh.save(bh.load(folder), tmp_path / "small")
    assert front(tmp_path / "small")["base_model"] == "owner/dense"


def test_no_absolute_path_of_a_record_is_published(tmp_path):
    home = str(tmp_path / "home of mine" / "x.txt")
    record = {"data": home, "also": [str(tmp_path / "b.jsonl")], "note": f"read '{tmp_path}/c.txt', by a/b of https://x.org/y/z"}
    text = saved(tmp_path, {"events": [EVENTS[0] | {"what": f"by {tmp_path}/d.py"}], **record})
    kept = (tmp_path / "small" / "billhook.json").read_text()
    assert str(tmp_path) not in text + kept
    assert json.loads(kept)["note"] == "read 'c.txt', by a/b of https://x.org/y/z"
    assert (json.loads(kept)["data"], json.loads(kept)["also"]) == ("x.txt", ["b.jsonl"])


def test_what_a_record_holds_is_neither_html_nor_markdown(tmp_path):
    evil = "<script>alert(1)</script> ![x](http://example.org) `a` *b* | c"
    by = {"callback": evil, evil: evil}
    event = {"step": evil, "what": evil, "label": f"{evil}!", "by": by, "not_refitted": evil}
    event["before"] = event["after"] = SIZES | {f"val{evil}": 1.0}
    more = {evil: evil, "degradation": [DEGRADATION[0] | {"source": evil}], "metrics": {f"val{evil}": 1.0}}
    text = saved(tmp_path, {"events": [event], "made_of": {"name": evil, "class": evil}} | more).split("---\n", 2)[2]
    assert text.count("alert(1)") >= 12
    assert "<script" not in text
    assert "](http://" not in text.replace("\\](http://", "")
    assert all(line.count("|") == line.count("\\|") for line in text.splitlines() if "alert" in line and line[0] != "|")


def test_tags_and_library_say_what_it_is(tmp_path):
    saved(tmp_path, {"events": EVENTS})
    assert front(tmp_path / "small")["tags"] == ["billhook", "pruned"]  # no figures of zeros before
    zeros = [{"what": "zeros", "before": SIZES, "after": SIZES | {"zeros": 500}}]
    saved(tmp_path, {"events": zeros})
    assert front(tmp_path / "small")["tags"] == ["billhook", "pruned", "sparse"]
    model = llama()
    bh.pruning.prune_units(model, {0: list(range(8))}, kind="channel")
    saving = bh.save(model, tmp_path / "uneven", record={"steps": 1})
    assert saving.way == "shaped"
    assert front(tmp_path / "uneven")["library_name"] == "billhook"
    assert 'billhook.load("uneven")' in (tmp_path / "uneven" / "README.md").read_text()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: own\nlicense_link: https://example.org/own",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/own"},
        ),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", {"license": "other", "license_name": "own"}),
        ("license: [mit, gpl]", {}),
        ("license: {a: b", {}),
        ("- license", {}),
        ("license_name: own", {}),
    ],
)
def test_the_licence_of_the_folder_that_it_was_made_of(tmp_path, head, expected):
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(f"---\n{head}\n---\n\n# A model")
    bh.save(bh.load(tmp_path / "dense"), tmp_path / "small", record={"steps": 1})
    assert {name: own for name, own in front(tmp_path / "small").items() if name.startswith("license")} == expected
    bh.save(bh.load(tmp_path / "small"), tmp_path / "smaller", record={"steps": 1})
    assert front(tmp_path / "smaller").get("license") == expected.get("license")


def test_the_licence_that_a_config_names_and_none_from_the_working_folder(tmp_path, monkeypatch):
    model = llama()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "billhook.json").write_text('{"base_model": "owner/another"}')
    monkeypatch.chdir(tmp_path)
    bh.save(model, "small", record={"steps": 1})
    assert not {"license", "base_model"} & front(tmp_path / "small").keys()  # made of a config, not of this folder
    model.config.license = "bsd-3-clause"
    bh.save(model, "small", record={"steps": 1})
    assert front(tmp_path / "small")["license"] == "bsd-3-clause"


def test_settings_once_and_what_a_line_can_say(tmp_path):
    by = {"callback": "WeightPruning", "criterion": "Wanda()", "calibration": {"from": "training data", "seed": 3}}
    events = [{"step": step, "what": "zeros", "before": SIZES, "after": SIZES, "by": by} for step in (1, 2)]
    more = {"importance": {"by": "Taylor()", "repair": None}, "note": "a|b", "plan": {"units": {"x": list(range(500))}}}
    text = saved(tmp_path, {"events": events, "calibration": {"sources": ["a.txt", "generated"], "seed": 0}} | more)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows.count("| WeightPruning | criterion Wanda(); calibration (from training data; seed 3) |") == 1
    assert {"| calibration | sources a.txt, generated; seed 0 |", "| importance | by Taylor() |", "| note | a\\|b |"} <= {*rows}
    assert not [row for row in rows if row.startswith("| plan")]


def test_what_validation_said(tmp_path):
    event = {"what": "x", "before": SIZES | {"val_loss": 3.0}, "after": SIZES | {"val_loss": 4.0}}
    text = saved(tmp_path, {"events": [event], "metrics": {"val_loss": 3.25}})
    assert "|  | before | after | at the last validation |\n" in text
    assert "| val_loss | 3 | 4 | 3.25 |" in text
    text = saved(tmp_path, {"start": SIZES | {"val_loss": 5.0}, "events": [event], "metrics": {"val_loss": 3.25}})
    assert "|  | at the start | before | after | at the last validation |\n" in text
    assert "| val_loss | 5 | 3 | 4 | 3.25 |" in text


def test_of_a_family_of_the_users_own(tmp_path):
    class OwnConfig(transformers.LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    model = OwnForCausalLM(OwnConfig.from_dict({**llama().config.to_dict(), "model_type": "own"}))
    bh.save(model, tmp_path / "small", record={"steps": 1})
    assert 'billhook.load("small")' in (tmp_path / "small" / "README.md").read_text()


def test_without_a_record_the_card_says_what_is_known(tmp_path):
    model = llama()
    model.config._name_or_path, model.config.license = "owner/dense", "mit"
    bh.save(model, tmp_path / "small")
    read = front(tmp_path / "small")
    assert (read["base_model"], read["license"], read["library_name"]) == ("owner/dense", "mit", "transformers")
    text = (tmp_path / "small" / "README.md").read_text()
    assert "## Changes\n\nNo record of the changes: " in text
    assert "| versions | billhook " in text
    assert "the complete record" not in text
    assert 'LlamaForCausalLM.from_pretrained("small")' in text
    record = json.loads((tmp_path / "small" / "billhook.json").read_text())
    assert record["versions"]["billhook"] == bh.__version__
    assert "README.md" in record["files"]


@pytest.mark.parametrize("anything", [None, 3, "x", [1, "x", {}], {"a": 1}, [{"what": 1, "before": 2, "after": None}]])
def test_a_record_of_ones_own_may_hold_anything(tmp_path, anything):
    text = saved(tmp_path, dict.fromkeys(("events", "degradation", "steps", "accuracy", "base_model"), anything))
    assert "## Usage" in text
    assert "Made from" not in text or anything == "x"
