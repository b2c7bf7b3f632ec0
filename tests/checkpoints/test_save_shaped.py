import json
import math
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import billhook
from billhook.checkpoints.save import FORMATS, load, save
from billhook.model.meta import from_name
from billhook.model.shape import KEY, set_shape, shape_of
from billhook.tracing.trace import trace
from kit.families import llama
from kit.image_models import swin
from kit.shaped import SHAPED, narrow, narrow_tied_llama, uneven_llama, uneven_mixtral

MORE = SHAPED | {"tied": narrow_tied_llama, "mixtral": uneven_mixtral}
DOWN = "model.layers.1.mlp.down_proj.weight"
WIDTH = "model.layers.1.mlp.intermediate_size"
INDEX = "model.layers.0.self_attn.layer_idx"
GROUPS = "model.layers.0.self_attn.num_key_value_groups"


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12)).logits


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for parameter in model.parameters():  # of the buffers, rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    return model


def written(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MORE)
def test_saved_and_loaded(family, dtype, tmp_path):
    model = cast(MORE[family](), dtype)
    fields = dict(vars(model.config))
    saved = save(model, tmp_path / "a")
    assert (saved.way, saved.difference) == ("shaped", 0)
    assert vars(model.config) == fields
    again = load(tmp_path / "a")
    assert type(again) is type(model)
    assert again.dtype == dtype
    assert not again.training
    assert torch.equal(logits(again), logits(model))
    assert shape_of(again) == shape_of(model)
    assert vars(again.config)[KEY] == written(tmp_path / "a")[KEY]
    assert again.config.architectures == [type(model).__name__]
    assert {str(t.device) for t in [*again.parameters(), *again.buffers()]} == {"cpu"}
    again_saved = save(again, tmp_path / "b")
    assert (again_saved.way, written(tmp_path / "b")) == ("shaped", written(tmp_path / "a"))


def test_in_shards(tmp_path, monkeypatch):
    real = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda *args, **options: real(*args, **options, max_shard_size="20KB")
    )
    model = uneven_llama()
    save(model, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="the safetensors files cannot be read"):
        load(tmp_path / "a")


def test_a_class_of_the_users_own_is_verified_in_it(tmp_path):
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits *= 2
            return output

    model = Doubled(llama().config)
    narrow(model, 0, 8)
    assert save(model, tmp_path / "a").difference == 0


@pytest.mark.parametrize("family", SHAPED)
def test_plain_transformers_refuses_it(family, tmp_path):
    model = SHAPED[family]()
    save(model, tmp_path / "a")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "a")
    assert "so from_pretrained fails" in FORMATS["shaped"]


def test_what_is_saved_is_the_shape_of_now(tmp_path):
    save(uneven_llama(), tmp_path / "a")
    model = load(tmp_path / "a")
    narrow(model, 1, 12)
    narrow(model, 0, 16)
    assert save(model, tmp_path / "a").way == "shaped"
    assert load(tmp_path / "a").model.layers[1].mlp.down_proj.in_features == 12
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


def test_a_model_that_is_plain_again(tmp_path):
    save(uneven_llama(), tmp_path / "a")
    model, plain = load(tmp_path / "a"), llama()
    set_shape(model, shape_of(plain))
    model.load_state_dict(plain.state_dict())
    assert save(model, tmp_path / "a").way == "plain"
    assert KEY not in written(tmp_path / "a")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")), logits(plain))


def test_what_a_config_said_before_is_not_trusted(tmp_path):
    save(uneven_llama(), tmp_path / "a")
    stale = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert hasattr(stale, KEY)
    model = transformers.LlamaForCausalLM(stale)
    assert save(model, tmp_path / "b").way == "plain"
    assert KEY not in written(tmp_path / "b")
    narrow(model, 0, 10)
    assert save(model, tmp_path / "b").way == "shaped"
    assert written(tmp_path / "b")[KEY]["shape"]["tensors"].keys() == {
        f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_a_field_that_was_changed_after_building_makes_no_shape(tmp_path):
    model = llama()
    model.config.pad_token_id = 2
    assert save(model, tmp_path / "a").way == "plain"
    assert KEY not in written(tmp_path / "a")


def test_numbers_that_a_forward_derives_from_its_inputs_are_no_shape(tmp_path):
    model, pixels = swin(image_size=8).eval(), torch.randn(1, 3, 8, 8)
    model(pixels)  # the second stage has a single window, which is not shifted
    billhook.apply(model, billhook.plan(model, billhook.importance.WeightNorm(), channels=0.25))
    assert save(model, tmp_path).way == "shaped"
    assert torch.equal(load(tmp_path)(pixels).logits, model(pixels).logits)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "good"
    save(uneven_llama(), folder)
    return folder


def _entry(value):
    return lambda config: config.update({KEY: value})


def _shape(part, value):
    return lambda config: config[KEY]["shape"].update({part: value})


def _part(part, **fields):
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    return lambda config: config[KEY]["shape"][part].update(fields)


def _size(value):
    return _part("tensors", **{DOWN: value})


def _width(value):
    return _part("attributes", **{WIDTH: value})


HOSTILE = {
    "entry is text": (_entry("text"), "the version is 'text', and this billhook knows only 1"),
    "version is later": (lambda config: config[KEY].update(version=3), "the version is '3'"),
    "shape is missing": (lambda config: config[KEY].pop("shape"), "tensors is 'None', but must be a mapping"),
    "tensors are a list": (_shape("tensors", [1]), "tensors is '.1.', but must be a mapping"),
    "size is a number": (_size(3), "must be a short list"),
    "size has a truth": (_size([True, 20]), "must be a short list"),
    "size is negative": (_size([-32, 20]), "must be a short list"),
    "size has a dimension more": (_size([32, 20, 1]), "is said to be .32, 20, 1., and LlamaForCausalLM has it with 2 dimensions"),
    "size has none": (_size([]), "has it with 2 dimensions"),
    "size is another": (_size([32, 24]), r"is said to be \(32, 24\), and is \(32, 20\) in the files"),
    "size is huge": (_size([2**40, 2**40]), "in the files"),
    "tensor is unknown": (_part("tensors", lm_head__bias=[64]), "lm_head.bias is named, and LlamaForCausalLM has nothing of"),
    "attribute is unknown": (_part("attributes", lm_head__forward=1), "lm_head.forward is named"),
    "attribute is private": (_part("attributes", model___version=1), "model._version is named"),
    "attribute is text": (_width("20"), "must be a 64-bit integer"),
    "attribute is a truth": (_width(True), "must be a 64-bit integer"),
    "attribute is huge": (_width(2**63), "must be a 64-bit integer"),
    "attribute is NaN": (_width(math.nan), "must be a 64-bit integer"),
    "attribute is zero": (_width(0), f"shape.attributes: {WIDTH} is 0, and must be a whole number from 1 to 48"),
    "attribute is negative": (_width(-20), f"{WIDTH} is -20, and must be a whole number from 1 to 48"),
    "attribute is more than its tensors": (_width(49), f"{WIDTH} is 49, and must be a whole number from 1 to 48"),
    "index is huge": (_part("attributes", **{INDEX: 2**60}), f"{INDEX} is {2**60}, and must be a whole number from 0 to 32"),
    "more groups than query heads": (_part("attributes", **{GROUPS: 9}), f"{GROUPS} is 9, and must be .* from 1 to 8"),
    "no groups": (_part("attributes", **{GROUPS: 0}), f"{GROUPS} is 0, and must be a whole number from 1 to 8"),
    "config asks for much": (lambda config: config.update(hidden_size=2**25), "in the files|far more than the files hold"),
    "config cannot be built": (lambda config: config.update(hidden_act="own"), "LlamaForCausalLM does not accept its config"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused_before_anything_is_loaded(case, good, tmp_path, monkeypatch):
    folder = shutil.copytree(good, tmp_path / "bad")
    change, message = HOSTILE[case]
    config = written(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"bad': config.json says under .{KEY}. what cannot be loaded: .*({message})"):
        load(folder)


@pytest.mark.parametrize("case", ["gone", "cut", "lacks one", "lacks one and is large", "pickled"])
def test_files_that_do_not_hold_it_are_refused(case, good, tmp_path, monkeypatch):
    folder = shutil.copytree(good, tmp_path / "bad")
    file, message = folder / "model.safetensors", "the safetensors files cannot be read"
    weights = load_file(file)
    if case == "cut":
        os.truncate(file, 2000)
    elif case.startswith("lacks"):
        message = f"{DOWN} is not in the files, nor anything that holds as many numbers"
        kept = {name: weight for name, weight in weights.items() if name != DOWN}
        save_file(kept | ({"other": torch.ones(639)} if case.endswith("large") else {}), file, {"format": "pt"})
    else:
        file.unlink()
        if case == "pickled":
            torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_tied_tensors_of_two_sizes_are_refused(tmp_path):
    save(narrow_tied_llama(), tmp_path / "a")
    for sizes, message in [
        ({"lm_head.weight": [64, 15]}, "is said to be"),
        ({"lm_head.weight": [64, 15], "model.embed_tokens.weight": [64, 15]}, r"is \(64, 16\) in the files"),
    ]:
        config = written(tmp_path / "a")
        config[KEY]["shape"]["tensors"].update(sizes)
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a")


@pytest.mark.parametrize("family", MORE)
def test_a_folder_is_described_as_it_is(family, tmp_path):
    model = MORE[family]()
    save(model, tmp_path / "a")
    for name in (tmp_path / "a", tmp_path / "a" / "config.json"):
        shadow = from_name(name)
        assert type(shadow) is type(model)
        assert shape_of(shadow).tensors == shape_of(model).tensors
        assert shape_of(shadow).attributes == shape_of(model).attributes
        assert KEY not in vars(shadow.config)
        assert {tensor.device.type for tensor in shadow.parameters()} == {"meta"}
    assert str(trace(tmp_path / "a")) == str(trace(model))


def test_a_config_that_disagrees_with_itself_does_not_run(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    config = written(folder)
    config[KEY]["shape"]["tensors"][DOWN] = [32, 24]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not run on meta tensors"):
        trace(folder)


def test_weights_that_a_class_makes_itself_are_saved_where_they_are_others(tmp_path):
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in [("layers", 1), ("ffn_dim", 8), ("attention_heads", 2)]
    }
    config = transformers.MarianConfig(
        vocab_size=50, d_model=16, max_position_embeddings=40, decoder_start_token_id=1, pad_token_id=0, **sides
    )
    model = transformers.MarianMTModel(config).eval()
    billhook.apply(model, billhook.plan(model, billhook.importance.WeightNorm(), residual=0.25))
    saved = save(model, tmp_path / "a")
    assert saved.difference == 0
    assert model._keys_to_ignore_on_save


def rwkv() -> PreTrainedModel:
    config = transformers.RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, context_length=16)
    return transformers.RwkvForCausalLM(config).eval()


def test_what_is_loaded_is_not_initialised_by_sizes_that_it_does_not_have(tmp_path):
    model = rwkv()
    billhook.apply(model, billhook.plan(model, billhook.importance.WeightNorm(), channels=0.25))
    assert save(model, tmp_path / "a").difference == 0


def test_blocks_without_which_the_class_builds_nothing_stay():
    model = rwkv()
    with pytest.raises(ValueError, match="blocks: RwkvForCausalLM cannot be built with the remaining blocks: ZeroDivisionError"):
        billhook.pruning.plan_units(model, {"rwkv.blocks": [1]}, kind="block")
