import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import billhook
from billhook import TransformerModule
from billhook.checkpoints import equivalent
from billhook.checkpoints.equivalent import EQUIVALENT, Family
from billhook.checkpoints.export import export
from billhook.checkpoints.save import FORMATS, load, save
from billhook.model.shape import KEY, shape_of
from billhook.pruning.planning import prune_units
from kit.equivalents import FOUR, same, three_of_four, written
from kit.families import EXTRA, build, tokens
from kit.fits import trainer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMAS = {
    "default": {},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_attention_heads": 8},
    "wide heads": {"head_dim": 16},
    "norms": {"rms_norm_eps": 0.1, "hidden_act": "gelu"},
}
BIASED = {"attention_bias": {"attention_bias": True}, "mlp_bias": {"mlp_bias": True}}
OWN = ["olmo", "cohere", "phi", "starcoder2", "smollm3", "granite"]


@pytest.mark.daily("default-*", "llama3-*32", "tied-*16", "grouped-*32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LLAMAS)
def test_a_llama_is_saved_as_a_mistral(case, dtype, tmp_path):
    model = three_of_four(**LLAMAS[case])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    fields, shape = dict(vars(model.config)), shape_of(model)
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.family, saved.difference) == ("equivalent", "mistral", 0)
    assert (type(model), vars(model.config), shape_of(model)) == (transformers.LlamaForCausalLM, fields, shape)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert type(again) is transformers.MistralForCausalLM
    assert type(load(tmp_path / "a")) is transformers.MistralForCausalLM
    assert again.dtype == dtype
    assert same(again, model)
    said = written(tmp_path / "a")
    assert (said["num_attention_heads"], said["head_dim"]) == (
        len(model.model.layers[0].self_attn.q_proj.weight) // again.config.head_dim,
        again.config.head_dim,
    )
    assert said["sliding_window"] is None
    assert KEY not in said
    assert save(again, tmp_path / "b").way == "plain"
    assert written(tmp_path / "b") == said


@pytest.mark.daily("mlp_bias")
@pytest.mark.parametrize("case", BIASED)
def test_a_llama_with_biases_is_saved_as_what_has_them(case, tmp_path):
    model = three_of_four(**BIASED[case])
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.family, saved.difference) == ("equivalent", "seed_oss", 0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert same(again, model)
    ids = tokens()
    assert torch.equal(again.train()(ids, labels=ids).loss, model.train()(ids, labels=ids).loss)


@pytest.mark.daily("olmo", "granite")
@pytest.mark.parametrize("family", OWN)
def test_a_class_that_reads_the_width_of_heads_says_it(family, tmp_path):
    model = three_of_four(family)
    fields = dict(vars(model.config))
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.family, saved.difference) == ("plain", None, 0)
    assert vars(model.config) == fields
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(model)
    assert same(again, model)
    said = written(tmp_path / "a")
    assert (said["num_attention_heads"], said["head_dim"]) == (3, 8)
    assert save(again, tmp_path / "b").way == "plain"
    assert written(tmp_path / "b") == said


@pytest.mark.parametrize("family", ["gemma2", "stablelm"])
def test_a_family_that_nothing_stands_for_is_shaped(family, tmp_path):
    model = three_of_four(family)
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.family) == ("shaped", None)
    assert same(load(tmp_path / "a"), model)


def test_a_config_of_another_family_with_the_same_code(tmp_path):
    EXTRA.setdefault("internlm3", {"head_dim": 8})
    model = three_of_four("internlm3")
    assert save(model, tmp_path / "a").family == "mistral"
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), model)


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_other_heads(task, tmp_path):
    kind = getattr(transformers, f"Llama{task}")
    model = kind(transformers.LlamaConfig.from_dict(build("llama", **FOUR).config.to_dict())).eval()
    prune_units(model, {0: [1], 1: [2]})
    assert save(model, tmp_path / "a").family == "mistral"
    again = load(tmp_path / "a")
    assert type(again).__name__ == f"Mistral{task}"
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])


def test_a_family_with_other_names_of_tensors_is_passed_over(tmp_path):
    model = transformers.LlamaForQuestionAnswering(build("llama", **FOUR).config).eval()  # Mistral's has it as `model`
    prune_units(model, {0: [1], 1: [2]})
    assert save(model, tmp_path / "a").family == "seed_oss"
    again, ids = load(tmp_path / "a"), tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).start_logits, model(ids).start_logits)


def test_a_class_of_the_users_own_keeps_its_name(tmp_path):
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits *= 2
            return output

    model = three_of_four()
    model.__class__ = Doubled
    assert save(model, tmp_path / "a").way == "shaped"


def test_what_only_the_other_family_would_read_is_not_overruled(tmp_path):
    model = three_of_four()
    model.config.sliding_window = 4
    assert save(model, tmp_path / "a").family != "mistral"


@pytest.mark.parametrize("wrong", ["other logits", "not all said"])
def test_an_equivalence_that_does_not_hold_is_not_taken(wrong, tmp_path, monkeypatch):
    right = EQUIVALENT["Llama"][0]
    family = Family("Mistral", {"sliding_window": 4}, right.lacks) if wrong == "other logits" else Family("Mistral", {}, {})
    monkeypatch.setattr(equivalent, "EQUIVALENT", {"Llama": (family,)})
    model = three_of_four()
    assert save(model, tmp_path / "a").way == "shaped"
    assert KEY in written(tmp_path / "a")
    assert same(load(tmp_path / "a"), model)


def test_the_generation_config_comes_along(tmp_path):
    model = three_of_four()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "a")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").generation_config.max_new_tokens == 7


def test_it_is_said(tmp_path):
    saved = save(three_of_four(), tmp_path / "a")
    assert saved.format == f"{FORMATS['equivalent']} (saved as mistral)"
    record = json.loads((tmp_path / "a" / "billhook.json").read_text())
    assert (record["saved"]["way"], record["saved"]["family"]) == ("equivalent", "mistral")
    run = trainer(tmp_path, [])
    run.strategy.connect(TransformerModule(three_of_four()))
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert "(saved as mistral)\nVerified: largest logit difference 0" in export(tmp_path / "last.ckpt", tmp_path / "b").text()
    assert type(load(tmp_path / "b")) is transformers.MistralForCausalLM


def test_heads_and_channels_together_are_said_by_the_config(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)).eval()
    billhook.apply(model, billhook.plan(model, billhook.importance.WeightNorm(), heads=0.34, channels=0.25))
    assert save(model, tmp_path / "a").way == "plain"
