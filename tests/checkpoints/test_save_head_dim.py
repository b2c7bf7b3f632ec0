"""Checkpoints whose heads are not as wide as the hidden size shared among them: engines must read that from config.json."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import billhook as bh
from billhook.checkpoints.save import load, save
from billhook.model.meta import from_name
from billhook.pruning.planning import prune_units
from kit.equivalents import same, three_of_four, written
from kit.families import build, tokens

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
QWENS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_attention_heads": 8},
    "yarn": {"rope_parameters": YARN},
    "a window that no layer has": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
}
WINDOWS = {
    "all layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "one layer": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


@pytest.mark.daily("default", "grouped")
@pytest.mark.parametrize("case", QWENS)
def test_a_qwen2_without_some_heads_is_saved_as_a_seed_oss(case, tmp_path):
    model = three_of_four("qwen2", **QWENS[case])
    fields = dict(vars(model.config))
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.family, saved.difference) == ("equivalent", "seed_oss", 0)
    assert (type(model), vars(model.config)) == (transformers.Qwen2ForCausalLM, fields)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(load(tmp_path / "a")) is transformers.SeedOssForCausalLM
    assert same(again, model)
    said = written(tmp_path / "a")
    assert (said["head_dim"], said["attention_bias"], said["attention_out_bias"]) == (again.config.head_dim, True, False)
    assert said.keys().isdisjoint({"layer_types", "use_sliding_window", "sliding_window", "max_window_layers"})
    assert save(again, tmp_path / "b").way == "plain"
    assert written(tmp_path / "b") == said


def test_a_loaded_qwen2_of_its_own_class_that_says_the_width_is_saved_as_one_too(tmp_path):
    model = build("qwen2", num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    assert save(model, tmp_path).family == "seed_oss"
    assert same(load(tmp_path), model)


def test_a_qwen2_with_a_narrower_residual_stream_is_saved_as_one_too(tmp_path):
    model = build("qwen2")
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), residual=0.25))
    assert save(model, tmp_path).family == "seed_oss"
    assert (written(tmp_path)["hidden_size"], written(tmp_path)["head_dim"]) == (24, 4)
    assert same(load(tmp_path), model)


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_keep_a_qwen2_what_it_is(case, tmp_path):
    model = three_of_four("qwen2", **WINDOWS[case])
    saved = save(model, tmp_path)
    assert (saved.way, saved.family) == ("plain", None)
    assert written(tmp_path)["head_dim"] == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.Qwen2ForCausalLM
    assert same(again, model)


def test_a_qwen2_that_engines_read_stays_one(tmp_path):
    model = build("qwen2")
    bh.convert_kv_heads(model, 1)
    assert (save(model, tmp_path).way, written(tmp_path)["model_type"]) == ("plain", "qwen2")


def test_what_is_saved_as_another_family_is_pruned_further(tmp_path):
    save(three_of_four("qwen2"), tmp_path / "a")
    model = load(tmp_path / "a")
    prune_units(model, {0: [1], 1: [2]})
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.5))
    assert save(model, tmp_path / "b").way == "plain"
    assert same(load(tmp_path / "b"), model)
    shadow = from_name(tmp_path / "b")
    assert (type(shadow).__name__, shadow.config.num_attention_heads) == ("SeedOssForCausalLM", 2)


def test_an_empty_width_of_heads_is_written_as_a_number(tmp_path):
    model = build("mixtral")
    assert model.config.head_dim is None
    assert save(model, tmp_path).way == "plain"
    assert written(tmp_path)["head_dim"] == 4
    assert model.config.head_dim is None
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)
