import copy
import json
import os
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import billhook
from billhook.assets import model_path
from billhook.checkpoints.export import export
from billhook.model.checkpoint_shape import save_shape
from billhook.model.shape import KEY, shape_of
from kit.shaped import SHAPED, uneven_llama

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
IDS = torch.arange(24).view(2, 12)


def build(**fields) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 64} | fields))


class Own(pl.LightningModule):
    """A user's own module, which knows nothing of billhook."""

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        self.head = nn.Linear(2, 2)
        setattr(self, name, model)
        self.name = name

    def training_step(self, batch, batch_idx):
        return getattr(self, self.name)(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module, folder, callbacks, weights_only=False, precision="32-true"):
    batches = [{"input_ids": IDS[i : i + 1], "labels": IDS[i : i + 1]} for i in range(2)]
    saving = ModelCheckpoint(folder, "last", save_weights_only=weights_only)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", callbacks=[*callbacks, saving], logger=False, precision=precision,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return saving.best_model_path


def conversion():
    return billhook.KVHeadConversion(2, at=1, measure_batches=0)


def same_logits(folder, model) -> bool:
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        return torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_converted_model_in_training(weights_only, tmp_path):
    module = billhook.TransformerModule(build())
    path = fit(module, tmp_path, [conversion()], weights_only)
    assert "Format: standard checkpoint" in str(export(path, str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2
    assert json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"] == 2
    assert same_logits(tmp_path / "out", module.model)
    state = torch.get_rng_state()
    assert export(path, tmp_path / "out").difference == 0  # over an earlier export
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["model", "net"])
def test_a_module_of_the_users_own(name, tmp_path):
    module = Own(name, build(tie_word_embeddings=True))
    export(fit(module, tmp_path, [conversion()]), tmp_path / "out")
    assert same_logits(tmp_path / "out", getattr(module, name))


def test_the_tokenizer_is_the_one_that_training_started_from(tmp_path, recwarn):
    module = billhook.TransformerModule("tiny")
    path = fit(module, tmp_path, [])
    export(path, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("to be")["input_ids"]
    with pytest.raises(ValueError, match="tokenizer='./nowhere' cannot be loaded"):
        export(path, tmp_path / "other", "./nowhere")
    checkpoint = torch.load(path)
    checkpoint[KEY]["name_or_path"] = "/gone/since"
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.warns(UserWarning, match="no tokenizer was saved, because none can be loaded from '/gone/since'"):
        export(tmp_path / "moved.ckpt", tmp_path / "moved")


@pytest.mark.parametrize("family", SHAPED)
def test_a_shape_that_the_class_does_not_build(family, tmp_path):
    model = SHAPED[family]()
    module = Own("model", model)
    checkpoint = {"state_dict": module.state_dict()}
    save_shape(module, checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    saved = export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    assert "so from_pretrained fails)\nVerified: largest logit difference 0" in str(saved)
    again = billhook.load(tmp_path / "out")
    assert shape_of(again) == shape_of(model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_weights_of_another_shape_than_is_said_are_refused(tmp_path):
    module = Own("model", uneven_llama())
    checkpoint = {"state_dict": module.state_dict()}
    save_shape(module, checkpoint)
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint["state_dict"][f"model.{name}"] = torch.ones(32, 4)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=rf"{name} is \(32, 48\) in the config, \(32, 20\) in the shape, \(32, 4\) in the weights"
    ):
        export(tmp_path / "a.ckpt", tmp_path / "out")
    del checkpoint["state_dict"][f"model.{name}"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"{name} .* missing in the weights"):
        export(tmp_path / "a.ckpt", tmp_path / "out")


def test_a_checkpoint_that_billhook_knows_nothing_of(tmp_path):
    path = fit(Own("model", build()), tmp_path, [])
    with pytest.raises(ValueError, match="because no billhook callback or module wrote it"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("to be or not")
    (tmp_path / "empty").write_text("")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb")
    torch.save({"state_dict": {"a": torch.ones(100)}}, tmp_path / "whole")
    (tmp_path / "truncated").write_bytes((tmp_path / "whole").read_bytes()[:300])
    for name in ("text", "empty", "pickle", "bomb", "truncated"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be read as a Lightning checkpoint"):
            export(name, "out")
    for name, content in [("list", [1]), ("no", {"a": 1}), ("odd", {"state_dict": 1}), ("ints", {"state_dict": {1: 2}})]:
        torch.save(content, name)
        with pytest.raises(ValueError, match="it has no state_dict"):
            export(name, "out")
    for name in ("nowhere", "."):
        with pytest.raises(ValueError, match="is neither a Lightning checkpoint .* nor a folder of its shards"):
            export(name, "out")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_refused_before_reading(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not a billhook checkpoint"):
        export(tmp_path / "nowhere.ckpt", tmp_path)


@pytest.fixture(scope="module")
def good():
    module = billhook.TransformerModule(build(num_key_value_heads=2))
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _config(**fields):
    return lambda held: held.update(config=json.dumps(json.loads(held["config"]) | fields))


def _shape(part, **fields):
    return lambda held: held["shape"][part].update({key.replace("__", "."): value for key, value in fields.items()})


def _set(**entries):
    return lambda held: held.update(entries)


def _constant(**entries):
    return lambda held: held["constants"].update(entries)


SCALING = "model.layers.0.self_attn.scaling"
HOSTILE = {
    "class is no model": _set(**{"class": "Trainer"}),
    "class is abstract": _set(**{"class": "PreTrainedModel"}),
    "class is dotted": _set(**{"class": "os.system"}),
    "class is of another config": _set(**{"class": "BertForMaskedLM"}),
    "class is missing": lambda held: held.pop("class"),
    "prefix is a number": _set(prefix=0),
    "prefix is another": _set(prefix="net."),
    "name is a list": _set(name_or_path=["a"]),
    "config is no JSON": _set(config="{"),
    "config is deep": _set(config="[" * 100000),
    "type is unknown": _config(model_type="own"),
    "key is a method": _config(to_dict=1, get_text_config=2),
    "dtype is none": _config(dtype="load"),
    "size is negative": _config(hidden_size=-16),
    "size is huge": _config(hidden_size=2**40, intermediate_size=2**40),
    "layers are endless": _config(num_hidden_layers=10**12),
    "activation is unknown": _config(hidden_act="__import__"),
    "shape is huge": _shape("tensors", lm_head__weight=[2**40, 2**40]),
    "shape has fewer than the weights": _shape("tensors", model__layers__0__mlp__down_proj__weight=[16, 8]),
    "shape is of another": _shape("tensors", other__weight=[1]),
    "shape contradicts": _shape("config", num_hidden_layers=10**9),
    "shape lacks one": lambda held: held["shape"]["tensors"].pop("lm_head.weight"),
    "constants are text": _set(constants="x"),
    "a constant is text": _constant(**{SCALING: "0.5"}),
    "a constant is past 64 bits": _constant(**{SCALING: 10**5000}),
    "a constant is another": _constant(**{SCALING: 1e18}),
    "constants are missing": lambda held: held.pop("constants"),
}


def test_a_config_far_larger_than_the_weights_takes_no_memory(good, tmp_path, monkeypatch):
    checkpoint = good | {KEY: copy.deepcopy(good[KEY])}
    for change in (_config(hidden_size=2**17), _shape("config", hidden_size=2**17)):
        change(checkpoint[KEY])
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_from_config", lambda *_, **__: pytest.fail("built by its config"))
    saved = export(tmp_path / "hostile.ckpt", tmp_path / "out")
    assert saved.way == "plain"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 16
    assert saved.megabytes < 0.1


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_entry_is_refused(case, good, tmp_path):
    checkpoint = good | {KEY: copy.deepcopy(good[KEY])}
    HOSTILE[case](checkpoint[KEY])
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match="hostile.ckpt"):
        export(tmp_path / "hostile.ckpt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["hostile.ckpt"]


def test_constants_from_a_file_are_only_compared(good, tmp_path):
    checkpoint = good | {KEY: copy.deepcopy(good[KEY])}
    names = ("forward", ".__class__", "model.layers.9.x", "model.layers.0.self_attn.attention_dropout", "model.x")
    checkpoint[KEY]["constants"].update(dict.fromkeys(names, 0.5))
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    export(tmp_path / "odd.ckpt", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[0].self_attn.attention_dropout == 0.0
    assert "x" not in vars(again.model)


def test_what_would_fetch_code_is_not_looked_at(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('exploded')\nclass Evil: pass\n")
    fields = {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "trust_remote_code": True,
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "experts_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "__class__": "evil",
    }
    checkpoint = good | {KEY: copy.deepcopy(good[KEY]), "global_step": ["3"]}
    _config(**fields)(checkpoint[KEY])
    _shape("attributes", model__layers__0__self_attn__head_dim=2**60)(checkpoint[KEY])  # follows from the config
    torch.save(checkpoint, "hostile.ckpt")
    export("hostile.ckpt", "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not set(fields) & set(written)
    assert not (tmp_path / "exploded").exists()


def exported(model, tmp_path):
    module = Own("model", model.eval())
    checkpoint = {"state_dict": module.state_dict()}
    save_shape(module, checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    return export(tmp_path / "a.ckpt", tmp_path / "out")


def test_a_class_that_another_familys_configs_are_registered_for(tmp_path):
    config = transformers.AutoConfig.for_model("exaone", **SIZES, num_key_value_heads=2, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(config) is not transformers.LlamaConfig
    assert type(model) is transformers.LlamaForCausalLM
    assert exported(model, tmp_path).difference == 0
    assert type(billhook.load(tmp_path / "out")) is type(model)


def test_a_config_with_a_number_that_json_lacks(tmp_path):
    config = transformers.Mamba2Config(**SIZES, num_heads=4, head_dim=8, n_groups=1, state_size=4, chunk_size=4)
    assert config.time_step_limit[1] == float("inf")
    exported(transformers.Mamba2ForCausalLM(config), tmp_path)
    assert billhook.load(tmp_path / "out").config.time_step_limit[1] == float("inf")


def test_a_config_that_derives_fields_of_those_within_it(tmp_path):
    config = transformers.MoshiConfig(**SIZES, ffn_dim=16, audio_vocab_size=50)
    config.depth_decoder_config.input_size += 1
    assert exported(transformers.MoshiForCausalLM(config), tmp_path).way == "plain"


def test_a_model_that_lost_tokens_before_training_is_exported_with_the_tokenizer_that_is_left(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    tokenizer.save_pretrained(tmp_path / "dense")
    model = billhook.load("tiny")
    plan = billhook.plan(model, batches=[{"input_ids": IDS + 300}], tokens=0.25)
    plan.trim_tokenizer(tokenizer).save_pretrained(tmp_path / "left")
    billhook.apply(model, plan)
    checkpoint = fit(billhook.TransformerModule(model), tmp_path, [])
    for name in (None, str(tmp_path / "dense")):
        with pytest.raises(ValueError, match=r"it has 2,048 tokens, but the model only 1,536.* \(--tokenizer FOLDER\)"):
            export(checkpoint, tmp_path / "out", name)
    export(checkpoint, tmp_path / "out", str(tmp_path / "left"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == billhook.load(tmp_path / "out").config.vocab_size == 1536
    again = fit(billhook.TransformerModule(str(tmp_path / "out")), tmp_path / "again", [])
    export(again, tmp_path / "again" / "out")  # with the tokenizer of the folder
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again" / "out")) == 1536
