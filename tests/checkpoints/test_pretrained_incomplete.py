"""Checkpoints that lack tensors, or hold them in other sizes, are refused by name; heads that a task adds are new and named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import billhook as bh
from billhook.model.layers import NEW
from kit.cli import small_llama
from kit.families import BERT

WEIGHT = "model.layers.1.mlp.up_proj.weight"
LOADS = {
    "load": bh.load,
    "stream": bh.stream,
    "module": bh.TransformerModule,
    "classifier": lambda name: bh.TransformerModule(name, "sequence-classification"),
    "teacher": lambda name: bh.TransformerModule("tiny", distillation=bh.training.Distillation(teacher=name)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("whole"))


def changed(whole, folder, change):
    """Copies a checkpoint whose tensors and config a function changes in place."""
    shutil.copytree(whole, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def lacks(whole, tmp_path_factory):
    return changed(whole, tmp_path_factory.mktemp("lacks") / "a", lambda tensors, _: tensors.pop(WEIGHT))


@pytest.mark.parametrize("way", LOADS)
def test_what_lacks_a_weight(way, lacks):
    with pytest.raises(ValueError, match=f"'{lacks}': {WEIGHT} of Llama.* is missing in the files"):
        LOADS[way](lacks)


@pytest.mark.parametrize("way", LOADS)
def test_more_blocks_than_the_files_hold(way, whole, tmp_path):
    name = changed(whole, tmp_path / "a", lambda _, config: config.update(num_hidden_layers=4))
    with pytest.raises(
        ValueError, match="18 tensors of Llama.* are missing in the files, such as model.layers.2.input_layernorm.weight"
    ):
        LOADS[way](name)


@pytest.mark.parametrize("way", ["load", "stream", "module"])
def test_another_size(way, whole, tmp_path):
    def longer(tensors, _):
        tensors["model.norm.weight"] = torch.ones(40)

    name = changed(whole, tmp_path / "a", longer)
    with pytest.raises(
        ValueError, match=r"'.*/a': .*model.norm.weight has size \[40\] in the files, but \[32\] in LlamaForCausalLM"
    ):
        LOADS[way](name)


def test_pickled_files_of_another_size(whole, tmp_path):
    """No headers of safetensors say sizes."""
    model = bh.load(whole)
    model.save_pretrained(tmp_path / "a")
    state = dict(model.state_dict())
    torch.save(state | {"model.norm.weight": torch.ones(40)}, tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.norm.weight has size \[40\] in the files, but \[32\]"):
        bh.load(tmp_path / "a")


@pytest.mark.parametrize("way", ["load", "stream", "module"])
def test_a_shard_that_is_not_there(way, whole, tmp_path):
    bh.load(whole).save_pretrained(tmp_path / "a", max_shard_size="100KB")
    first, *_, last = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    (tmp_path / "a" / last).unlink()
    with pytest.raises(ValueError, match=rf"'.*/a': {last}, which model.safetensors.index.json names, is not there$"):
        LOADS[way](str(tmp_path / "a"))
    (tmp_path / "a" / first).unlink()
    with pytest.raises(ValueError, match=rf"{first}, which .* is not there, nor are 1 more"):
        LOADS[way](str(tmp_path / "a"))


def test_a_shape_of_ones_own(whole, tmp_path):
    """As `bh.save` writes it."""
    model = bh.load(whole)
    bh.apply(model, bh.pruning.plan_units(model, {"model.layers.0.mlp": [0]}, kind="channel"))
    bh.save(model, tmp_path / "shaped")
    name = changed(tmp_path / "shaped", tmp_path / "a", lambda tensors, _: tensors.pop(WEIGHT))
    for way in ("load", "stream", "module", "classifier"):
        with pytest.raises(ValueError, match=f"{WEIGHT} of Llama.* is missing in the files"):
            LOADS[way](name)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(folder)
    return folder


class TestHeads:
    """Of a BERT: what a classifier adds to the model that was saved is new, and said in one line."""

    def test_those_of_a_task(self, masked, caplog):
        with caplog.at_level("INFO"):
            lit = bh.TransformerModule(str(masked), "sequence-classification")
        parts = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
        (said,) = [one.getMessage() for one in caplog.records if "random" in one.getMessage()]
        assert said == f"'{masked}': {parts} of BertForSequenceClassification not in the checkpoint, initialized randomly"
        new = [name for name, module in lit.model.named_modules() if hasattr(module, NEW)]
        assert new == ["bert.pooler.dense", "classifier"]

    def test_not_those_that_the_saved_model_had(self, masked, tmp_path):
        bh.TransformerModule(str(masked), "sequence-classification").model.save_pretrained(tmp_path / "b")
        assert bh.load(tmp_path / "b").num_labels == 2
        for gone in ("classifier.weight", "bert.pooler.dense.bias"):
            name = changed(tmp_path / "b", tmp_path / gone, lambda tensors, _, gone=gone: tensors.pop(gone))
            for way in ("load", "classifier"):
                with pytest.raises(ValueError, match=f"{gone} of BertForSequenceClassification is missing in the files"):
                    LOADS[way](name)

    def test_another_number_of_classes(self, masked, tmp_path):
        bh.TransformerModule(str(masked), "sequence-classification").model.save_pretrained(tmp_path / "b")
        with pytest.raises(ValueError, match=r"classifier.bias has size \[2\] in the files, but \[3\] in Bert.*; 1 more differ"):
            bh.TransformerModule(str(tmp_path / "b"), "sequence-classification", num_labels=3)

    def test_where_the_class_that_was_saved_is_not_known(self, masked, tmp_path):
        name = changed(masked, tmp_path / "a", lambda _, config: config.pop("architectures"))
        assert hasattr(LOADS["classifier"](name).model.classifier, NEW)
