"""FSDP2: two processes export a model a block at a time, and it is the one that is written from memory."""

import pytest
import torch
from safetensors.torch import load_file

import billhook as bh
from billhook.checkpoints.export import export
from kit.exports import MODELS, merged
from kit.ranks import run_script

pytestmark = [pytest.mark.nightly, pytest.mark.slow]
SCRIPT = "from kit.exports import export_all\nexport_all()\n"
WAYS = {"multi-query": "equivalent"}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [str(folder)])
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_write_what_one_does_with_the_model_in_memory(of_two, tmp_path, name):
    first, second = torch.load(of_two / f"{name}.pt", weights_only=False)
    assert (first.saved.way, first.saved.difference, second.saved) == (WAYS.get(name, "plain"), 0, None)
    dense = merged(name, first.state)
    bh.save(dense, tmp_path / "dense")
    files = [folder / "model.safetensors" for folder in (of_two / name, tmp_path / "dense")]
    found, expected = map(load_file, files)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_module_is_as_it_was(of_two, name):
    assert all(own.unchanged for own in torch.load(of_two / f"{name}.pt", weights_only=False))


def test_all_ranks_keep_their_shards_where_the_first_cannot_save(of_two, tmp_path):
    (first, second), state = torch.load(of_two / "failing.pt", weights_only=False)
    assert first == "other logits"
    assert "this rank stops, because another failed: rank 0 (RuntimeError: other logits)" in second
    assert "other logits" in (of_two / "failing-unverified" / "UNVERIFIED.txt").read_text()
    export(of_two / "failing-unverified" / "weights.ckpt", tmp_path / "out")
    found = bh.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
