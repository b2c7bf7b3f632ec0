"""A model with PEFT's adapters is saved as a plain checkpoint of the merged weights, and is left as it was."""

import copy
import json
import logging

import peft
import pytest
import torch
import transformers

import billhook as bh
from billhook.adapters.checkpoint import ADAPTERS
from billhook.adapters.merge import temporarily_merged
from billhook.checkpoints.export import export
from billhook.model.find import find_transformer
from billhook.model.layers import prunable
from kit.adapters import BUILD, IDS, logits, lora, pruned
from kit.families import llama
from kit.fits import data, trainer
from kit.weight_pruning import checkpoints, injected

LOSSY = pytest.mark.filterwarnings("ignore:the checkpoint differs from the model")


def saved(model, folder):
    """Saves it, and checks that it has not changed and that transformers alone loads the result."""
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    base = find_transformer(model)
    config, computed = base.config.to_dict(), logits(base)
    result = bh.save(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert base.config.to_dict() == config
    assert torch.equal(logits(base), computed)
    assert json.loads((folder / "billhook.json").read_text())["saved"]["adapters"] == result.adapters
    loaded, info = type(base).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return result, loaded.eval()


@pytest.mark.parametrize("build", BUILD)
def test_a_dense_model_is_merged_in_full(tmp_path, build):
    torch.manual_seed(0)
    model = lora(BUILD[build]())
    result, loaded = saved(model, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
    assert result.adapters == f"merged adapters of {len(prunable(loaded))} layers in place, all in full, because none is sparse"


@pytest.mark.parametrize("build", BUILD)
def test_masked_adapters_are_saved_as_they_compute(tmp_path, build):
    model, masks = pruned(build)
    bh.training.mask_adapters(model)
    result, loaded = saved(model, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
    assert result.adapters.endswith("zeros kept; no update was lost")
    linears = prunable(loaded)
    assert all(torch.equal(linears[name].weight != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("build", BUILD)
def test_what_zeros_cost_is_said(tmp_path, build):
    model, masks = pruned(build)
    expected = bh.training.merge(copy.deepcopy(model))
    with pytest.warns(UserWarning, match=r"the checkpoint differs from the model: .* was lost on average, .*%"):
        result, loaded = saved(model, tmp_path / "out")
    assert torch.equal(logits(loaded), logits(expected.model))
    assert (logits(loaded) - logits(model)).abs().max() > 1e-2
    mean = sum(expected.error.values()) / len(expected.error)
    assert f"zeros kept; {mean:.1%} of the updates of sparse layers was lost on average" in result.adapters
    linears = prunable(loaded)
    assert all(torch.equal(linears[name].weight != 0, mask) for name, mask in masks.items())


def test_zeros_by_chance_are_no_pruning(tmp_path):
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        for linear in prunable(model).values():
            linear.weight.view(-1)[::300] = 0
    model = lora(model)
    _, loaded = saved(model, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


class TestOtherThings:
    """What else PEFT puts into a model."""

    def bert(self):
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
        )
        return transformers.BertForSequenceClassification(config).eval()

    def check(self, model, folder):
        result, loaded = saved(model, folder / "out")
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
        return result

    def test_a_head_that_is_trained_in_full(self, tmp_path):
        model = lora(self.bert(), target_modules=["query"], modules_to_save=["classifier"])
        model.get_base_model().classifier.modules_to_save["default"].weight.data.normal_()
        self.check(model, tmp_path)

    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`")
    def test_a_head_that_is_no_longer_tied(self, tmp_path):
        model = lora(llama(tie_word_embeddings=True), target_modules=["q_proj"], modules_to_save=["lm_head"])
        model.get_base_model().lm_head.modules_to_save["default"].weight.data.normal_()
        self.check(model, tmp_path)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False

    def test_embeddings(self, tmp_path):
        model = lora(llama(tie_word_embeddings=False), target_modules=["q_proj", "embed_tokens"])
        model.get_base_model().model.embed_tokens.lora_embedding_A["default"].data.normal_()
        self.check(model, tmp_path)
        only = lora(llama(tie_word_embeddings=False), target_modules=["embed_tokens"])
        only.get_base_model().model.embed_tokens.lora_embedding_A["default"].data.normal_()
        assert self.check(only, tmp_path).adapters.startswith("no adapters on linear layers were left to merge")

    def test_dora(self, tmp_path):
        self.check(lora(llama(), use_dora=True), tmp_path)

    def test_disabled_or_merged(self, tmp_path):
        model = lora(llama())
        with model.disable_adapter():
            self.check(model, tmp_path)
        model.merge_adapter()
        assert self.check(model, tmp_path).adapters.startswith("no adapters on linear layers were left to merge")

    def test_a_model_of_transformers_with_adapters_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # asks for PEFT 0.22
        torch.manual_seed(0)
        model = llama()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        self.check(model.eval(), tmp_path)
        merged = bh.training.merge(model).model
        merged.save_pretrained(tmp_path / "plain")  # which writes an adapter alone as long as there is one
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "plain")), logits(merged))


class TestRefused:
    """With nothing written."""

    def refused(self, model, folder, match):
        with pytest.raises(ValueError, match=match):
            bh.save(model, folder / "out")
        assert not list(folder.iterdir())

    def test_prompts(self, tmp_path):
        model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        self.refused(model, tmp_path, "model: PromptTuningConfig adds prompts to the inputs, which a model checkpoint cannot")

    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`")
    def test_a_weight_that_others_have_too(self, tmp_path):
        model = lora(llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"])
        self.refused(model, tmp_path, "embed_tokens shares its weight with another module")

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
    def test_a_bias_that_has_no_place(self, tmp_path):
        model = lora(llama(), target_modules=["q_proj"], lora_bias=True)
        self.refused(model, tmp_path, "the adapters of .*q_proj cannot be merged: Impossible to merge")


@LOSSY
def test_the_callback_says_what_zeros_cost(files, tmp_path, caplog):
    lit, export = injected(), bh.Export(str(tmp_path / "out"))
    bh.prune(lit.model, bh.Magnitude(), sparsity=0.5)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [export], max_steps=2).fit(lit, data(files))
    assert f"from_pretrained loads it; {export.saved.adapters}" in caplog.text
    assert "was lost on average" in export.saved.adapters
    assert bh.load(tmp_path / "out")(input_ids=IDS).logits.isfinite().all()


def test_a_lightning_checkpoint_with_adapters_is_exported_merged(files, tmp_path):
    lit = injected()
    trainer(tmp_path, [bh.WeightPruning(bh.Magnitude(), 0.5, measure_batches=0), checkpoints(tmp_path)], max_steps=1).fit(
        lit, data(files)
    )
    export(tmp_path / "step=1.ckpt", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with temporarily_merged(lit.model.eval()) as merged:
        expected = merged.model
    assert not [name for name, _ in again.named_parameters() if "lora" in name]
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_adapters_of_which_a_checkpoint_does_not_say_how_they_are_scaled_are_refused(files, tmp_path):
    lit = injected()
    trainer(tmp_path, [checkpoints(tmp_path)], max_steps=1).fit(lit, data(files))
    held = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    own = {key: value for key, value in held.items() if key != ADAPTERS}
    assert len(own) < len(held)
    torch.save(own, tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match=r"contains adapters \(.*base_layer.weight\) without their scaling"):
        export(tmp_path / "without.ckpt", tmp_path / "out")
