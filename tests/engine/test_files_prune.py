"""Streamed models: the same logits, and the same bytes after pruning, as in memory."""

from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_configs import small_config

import billhook as bh
from billhook.model.inputs import make_inputs
from billhook.model.streamed import stream
from kit import prunes, stopped
from kit.streams import same, written

FAMILIES = [
    "Llama",
    "GPT2LMHead",
    "T5ForConditionalGeneration",
    "Mixtral",
    "Phi3",
    "Qwen2Moe",
    "BertForMaskedLM",
    "OPT",
    "BartForConditionalGeneration",
    "Gemma2",
    "MarianMT",  # its class makes positions, which are in no file
]


class SeenByAll(bh.Wanda):
    """Wanda's scores, of all weights of a model together."""

    compares = "global"


def class_of(family):
    return next(found for end in ("", "ForCausalLM", "Model") if (found := getattr(transformers, family + end, None)))


@pytest.fixture(params=FAMILIES)
def folder(tmp_path, request):
    kind = class_of(request.param)
    torch.manual_seed(0)
    model = kind(small_config(kind.config_class)).eval()
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def shown(model, count=3):
    batches = []
    for seed in range(count):
        torch.manual_seed(seed)
        batches.append(make_inputs(model, 2, 12))
    return batches


def test_the_same_logits(folder):
    dense, streamed = bh.load(folder), stream(folder)
    inputs = shown(dense, 1)[0]
    with torch.no_grad():
        assert torch.equal(dense(**inputs)[0], streamed(**inputs)[0])


def test_a_module_that_is_called_without_its_block():
    (dense, streamed), inputs = (way("tiny", dtype="float32") for way in (bh.load, stream)), torch.randn(2, 256)
    for name in ("model.layers.2.input_layernorm", "model.layers.1.mlp.gate_proj", "model.norm"):
        assert torch.equal(dense.get_submodule(name)(inputs), streamed.get_submodule(name)(inputs))


def saved_alike(dense, streamed, folder):
    """Tells whether two models, the second of them streamed to `out`, are the same once they are saved."""
    bh.save(dense, folder / "in memory")
    bh.save(streamed, folder / "out")
    return same(folder / "out", bh.load(folder / "in memory"))


@pytest.mark.daily("Llama-*", "T5*-criterion0", "Mixtral-criterion0", "GPT2*-criterion1", "BertForMaskedLM-criterion0")
@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.Wanda(), bh.SparseGPT()])
def test_the_same_bytes(folder, tmp_path, criterion):
    dense, streamed = bh.load(folder), stream(folder, tmp_path / "out")
    plans = [bh.prune(model, criterion, shown(dense), sparsity=0.5) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    assert saved_alike(dense, streamed, tmp_path)


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.daily("Llama", "T5*")  # which keeps some layers in float32
@pytest.mark.parametrize("folder", ["Llama", "T5ForConditionalGeneration", "Mixtral", "Phi3", "MarianMT"], indirect=True)
def test_the_same_files_in_another_dtype_where_few_blocks_change(folder, tmp_path):
    for open_model, out in ((bh.load, tmp_path / "in memory"), (partial(stream, out=tmp_path / "out"), tmp_path / "out")):
        model = open_model(folder, dtype="float16")
        bh.prune(model, bh.Magnitude(), sparsity=0.5, options=bh.PruneOptions(skip=["*.0.*"]))
        bh.save(model, out)
    expected, found = tensors_in(tmp_path / "in memory"), tensors_in(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.daily("Llama-*", "T5*-block", "GPT2*-layer")
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_the_same_bytes_where_blocks_are_matched(folder, tmp_path, sequential):
    dense, streamed = bh.load(folder), stream(folder, tmp_path / "out")
    how = {"sparsity": 0.5, "sequential": sequential, "match": bh.criteria.BlockMatching(steps=3)}
    plans = [prunes.prune(model, bh.Wanda(), shown(dense), **how) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    assert saved_alike(dense, streamed, tmp_path)


@pytest.mark.daily("3-block", "3-layer")
@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_stopped_and_called_again_where_blocks_are_matched(tmp_path, monkeypatch, sequential, blocks):
    """It goes on: the dense model's runs pass the blocks as they were, and the others what has been made of them."""

    def work(model):
        how = {"sparsity": 0.5, "sequential": sequential, "match": bh.criteria.BlockMatching(steps=3)}
        return model, prunes.prune(model, bh.Wanda(), shown(model), **how)

    written, go_on = stopped.stop_after(blocks, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        work(bh.stream("tiny", tmp_path / "out"))
    go_on()
    streamed, plan = work(bh.stream("tiny", tmp_path / "out"))
    assert written == [f"model.layers.{number}" for number in range(4)] * 2  # masks and values, then blocks
    bh.save(streamed, tmp_path / "out")
    dense, straight = work(bh.load("tiny"))
    assert plan.text() == straight.text()
    assert same(tmp_path / "out", dense)


WORDS = {"tied in part": 0.5, "none is removed": 0.0, "nearly all": 0.999}


@pytest.mark.parametrize("sparsity", WORDS.values(), ids=WORDS)
def test_the_same_bytes_where_all_weights_compete(tmp_path, sparsity):
    """Of weights with few digits many are tied, and those that go are in the middle of a block."""
    dense = bh.load("tiny")
    with torch.no_grad():
        for parameter in dense.model.layers.parameters():
            parameter.copy_((parameter * 20).round() / 20)
    dense.save_pretrained(tmp_path / "dense")
    streamed = bh.stream(tmp_path / "dense", tmp_path / "out")
    plans = [bh.prune(model, bh.Magnitude(compares="global"), sparsity=sparsity) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]


@pytest.mark.parametrize("family", [transformers.GPT2LMHeadModel, transformers.T5ForConditionalGeneration], ids=str)
def test_the_same_bytes_where_all_weights_compete_by_what_they_see(tmp_path, family):
    dense = bh.load(written(family, tmp_path / "dense"))
    streamed, criterion = stream(tmp_path / "dense", tmp_path / "out"), SeenByAll()
    how = {"sparsity": 0.5, "sequential": "none", "output_embeddings": True}
    plans = [prunes.prune(model, criterion, shown(dense), **how) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    assert saved_alike(dense, streamed, tmp_path)


def test_masks_where_all_weights_compete():
    plans = [
        bh.prune(model, bh.Magnitude("global"), sparsity=0.5, dry_run=True) for model in (bh.load("tiny"), bh.stream("tiny"))
    ]
    assert plans[0].to_json() == plans[1].to_json()
