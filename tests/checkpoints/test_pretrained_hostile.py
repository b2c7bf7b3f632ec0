"""Checkpoints that mean harm: no code of theirs runs, nothing outside of their folder changes, and a sentence says why not."""

import copy
import json
import os
import pickle
import shutil

import pytest
import torch
import transformers

import billhook as bh
from billhook.atomic_folder import RECORD
from billhook.checkpoints.export import export
from kit.families import llama

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
KEYS = "model.layers.0.self_attn.k_proj"


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(autouse=True)
def _nothing_explodes(tmp_path, monkeypatch):
    """Code beside a checkpoint, and on the path, that leaves a trace when it runs; nobody is there to say yes."""
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nclass Evil: pass\ndef go(*_, **__): pass\n"
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    yield
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "good"
    bh.save(llama(**SMALL, vocab_size=2048), folder, bh.TextDataModule("tiny", "tiny").tokenizer)
    return folder


def config(**fields):
    def change(folder):
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(held | fields))
        shutil.copy(folder.parent / "evil.py", folder)

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def header(content, length=None):
    return written("model.safetensors", (length or len(content)).to_bytes(8, "little") + content)


def index(**content):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb(folder.parent / "exploded")}, folder / "pytorch_model.bin")


AUTO = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
FAR = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 10**15]}}).encode()
FOLDERS = {
    "code for its type": (config(auto_map=AUTO, model_type="evil"), "custom code|not a config of a family"),
    "code, and a word for it": (config(auto_map=AUTO, model_type="evil", trust_remote_code=True), "custom code|not a config"),
    "a kernel": (config(_attn_implementation="evil/kernel"), "asks for the kernel 'evil/kernel', which is code"),
    "a kernel for experts": (config(experts_implementation="evil/kernel"), "asks for the kernel"),
    "endless layers": (config(num_hidden_layers=10**12), "asks for 1000000000000 blocks"),
    "a huge width": (config(hidden_size=10**18), "cannot be loaded|not a config"),
    "a width of text": (config(hidden_size="16"), "not a config of a family"),
    "no heads": (config(num_attention_heads=0), "cannot be loaded|not a config"),
    "a dunder class": (config(architectures=["__class__"]), "which transformers does not have"),
    "a class of numbers": (config(architectures=3), "which transformers does not have|not a config"),
    "a class of another family": (config(architectures=["BertForMaskedLM"]), "no BertForMaskedLM is built"),
    "an abstract class": (config(architectures=["PreTrainedModel"]), "no PreTrainedModel is built"),
    "fields that are methods": (config(to_dict=1, get_text_config=2, __class__="x"), "cannot be loaded|not a config"),
    "no such dtype": (config(dtype="load_library"), "cannot be loaded|not a config"),
    "a type that is a list": (config(model_type=["llama"]), "not a config of a family"),
    "a rope of its own": (config(rope_parameters={"rope_type": "evil"}), "cannot be loaded|not a config"),
    "deep": (written("config.json", "[" * 200000), "not a config of a family .*: RecursionError"),
    "no text": (written("config.json", b"\xff\xfe\x00"), "has no config that can be read"),
    "a header far too long": (header(b"", 2**63 - 1), "cannot be loaded: SafetensorError"),
    "far offsets": (header(FAR), "cannot be loaded: SafetensorError"),
    "a pickle": (pickled, "cannot be loaded: UnpicklingError"),
    "a shard elsewhere": (index(metadata={}, weight_map={"model.norm.weight": "../evil.py"}), "cannot be loaded"),
    "generation by a list": (written("generation_config.json", "[]"), "cannot be loaded"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder(case, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    change, message = FOLDERS[case]
    change(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"bad'.*({message})"):
        bh.load(folder)
    if case not in ("a dunder class", "a dotted class", "a class of numbers", "a class of another family", "an abstract class"):
        with pytest.raises(ValueError, match=r"bad|asks for"):
            bh.TransformerModule(str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["code for its type", "a kernel", "endless layers", "deep", "a class of numbers"])
def test_a_folder_that_is_only_described(case, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    FOLDERS[case][0](folder)
    for name in (folder, folder / "config.json"):
        if case != "a class of numbers":
            with pytest.raises(ValueError, match="bad"):
                bh.trace(name)
            with pytest.raises(ValueError, match="bad"):
                bh.TransformerModule(str(folder / "config.json"))
        else:
            bh.trace(name)


def test_a_tokenizer_with_code(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "bad")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config(model_type="evil", auto_map=AUTO)(folder)
    with pytest.raises(ValueError, match="code that comes with it"):
        _ = bh.TextDataModule("tiny", str(folder)).tokenizer


@pytest.mark.parametrize(
    "files", [["../mine/notes"], ["a.safetensors", "../mine"], "notes", {"notes": 1}, 3, [[]], [None], "[" * 10]
)
def test_a_record_that_names_files_elsewhere(files, tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "a"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    bh.save(llama(**SMALL), target)
    (target / RECORD).write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match="is not a billhook checkpoint"):
        bh.save(llama(**SMALL), target)
    (target / RECORD).write_text(json.dumps({"files": [*os.listdir(target), "../mine/notes", "../mine"]}))
    bh.save(llama(**SMALL), target)
    assert (mine / "notes").read_text() == "mine"


def test_a_record_that_is_deep_or_no_file(tmp_path):
    bh.save(llama(**SMALL), tmp_path / "a")
    (tmp_path / "a" / RECORD).write_text("[" * 200000)
    with pytest.raises(ValueError, match="is malformed"):
        bh.save(llama(**SMALL), tmp_path / "a")
    (tmp_path / "a" / RECORD).unlink()
    (tmp_path / "a" / RECORD).mkdir()
    with pytest.raises(ValueError, match="is malformed"):
        bh.save(llama(**SMALL), tmp_path / "a")


def test_links_in_a_checkpoint_are_not_followed(tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "a"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    bh.save(llama(**SMALL), target)
    (target / "link").symlink_to(mine)
    record = json.loads((target / RECORD).read_text())
    (target / RECORD).write_text(json.dumps(record | {"files": [*record["files"], "link"]}))
    bh.save(llama(**SMALL), target)
    assert (mine / "notes").read_text() == "mine"
    assert not (target / "link").exists()


@pytest.fixture(scope="module")
def kept():
    module = bh.TransformerModule(llama(**SMALL))
    bh.convert_kv_heads(module, 2)
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3, "pytorch-lightning_version": "2.6.0", "loops": {}}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def entry(**fields):
    return lambda held, _: held["billhook"].update(fields)


def shape(part, **fields):
    said = {name.replace("__", "."): value for name, value in fields.items()}
    return lambda held, _: held["billhook"]["shape"][part].update(said)


def size(value):
    return lambda held, _: held["billhook"]["shape"]["tensors"].update({f"{KEYS}.weight": value})


CKPTS = {
    "a class for weights": (lambda held, bomb: held.update(state_dict=bomb), "Weights only load failed"),
    "a class for a shape": (lambda held, bomb: held.update(billhook=bomb), "Weights only load failed"),
    "an entry of text": (lambda held, _: held.update(billhook="x"), "class is missing or has the wrong type"),
    "no class": (entry(**{"class": 3}), "class is missing or has the wrong type"),
    "no config": (entry(config=3), "config is missing or has the wrong type"),
    "a config that is no JSON": (entry(config="{"), "config: Expecting property name"),
    "a deep config": (entry(config="[" * 200000), "config: maximum recursion"),
    "a later version": (entry(version=9), "has version 9"),
    "no shape": (entry(shape={}), r"shape.tensors is 'None', but must be a mapping"),
    "a huge size": (size([10**9, 10**9]), r"gives .*k_proj.weight the size .*, but its weight has \(8, 16\)"),
    "a negative size": (size([-16, 16]), "must be a short list of integers"),
    "a dimension more": (size([8, 16, 1]), "but its weight has"),
    "a size that is not held": (shape("tensors", other=[2**30, 2**20]), "values without weights"),
    "a tensor that is not there": (shape("tensors", other=[2]), "contains a different model"),
    "a method": (shape("attributes", model__forward="x"), "must be a 64-bit integer"),
    "a huge attribute": (
        shape("attributes", model__layers__0__self_attn__num_key_value_groups=10**30),
        "must be a 64-bit integer",
    ),
    "lists that are none": (shape("lists", layer_types=3), "must be a list of plain values"),
    "a list that no config takes": (shape("lists", eos_token_id=["a"]), "eos_token_id"),
    "blocks of text": (shape("blocks", model__layers="x"), "must be a number of blocks"),
    "blocks that are far": (shape("blocks", model__layers=[2, [0, 5]]), "must be a number of blocks"),
    "a block twice": (shape("blocks", model__layers=[2, [0, 0]]), "must be a number of blocks"),
    "endless blocks": (shape("blocks", model__layers=[10**9, [0]]), "had 1000000000 blocks originally"),
    "a function to be called": (lambda held, _: held.update(hyper_parameters={"_instantiator": "evil.go"}), None),
}


@pytest.mark.parametrize("case", CKPTS)
def test_a_lightning_checkpoint(case, kept, tmp_path):
    change, message = CKPTS[case]
    held = copy.deepcopy(kept)
    change(held, Bomb(tmp_path / "exploded"))
    torch.save(held, tmp_path / "bad.ckpt")
    given = llama(**SMALL)
    before = {name: (id(one), one.shape) for name, one in given.named_parameters()}
    with pytest.raises((ValueError, pickle.UnpicklingError), match=message):
        bh.TransformerModule.load_from_checkpoint(tmp_path / "bad.ckpt", model=given)
    assert {name: (id(one), one.shape) for name, one in given.named_parameters()} == before
    if message == "Weights only load failed":
        with pytest.raises(ValueError, match="cannot be read as a Lightning checkpoint"):
            export(tmp_path / "bad.ckpt", tmp_path / "out")


@pytest.mark.parametrize("said", ["x", {"__class__": 1, "forward": 2}])
def test_names_of_methods_in_a_shape_set_nothing(said, kept, tmp_path):
    held = copy.deepcopy(kept)
    fields = {f"model.layers.0.{name}": 1 for name in ("forward", "__class__", "_parameters", "training")}
    held["billhook"]["shape"]["attributes"] |= fields
    held["billhook"]["shape"]["config"] |= {"__class__": 1, "to_dict": 2}
    held["said"] = said
    torch.save(held, tmp_path / "odd.ckpt")
    loaded = bh.TransformerModule.load_from_checkpoint(tmp_path / "odd.ckpt", model=llama(**SMALL)).model
    assert type(loaded.model.layers[0]) is transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert not {"forward", "__class__"} & vars(loaded.model.layers[0]).keys()
    assert "to_dict" not in vars(loaded.config)
    assert torch.equal(loaded.lm_head.weight, kept["state_dict"]["model.lm_head.weight"])
