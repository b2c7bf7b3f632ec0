"""A process that may not take as much memory as a model has bytes prunes it where it is streamed, and only there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine import memory
from billhook.engine.store import store_of
from kit.limited import LIMITS, WAYS

SCRIPT = Path(__file__).parents[1] / "kit" / "limited.py"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 227 MB in sixteen blocks of 14 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12, "vocab_size": 512}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30MB")
    return folder


@pytest.fixture(scope="module")
def ended(large, tmp_path_factory):
    """A folder of what came of each limit, and how each process ended; they are made of one, which takes seconds to start."""
    out, size = tmp_path_factory.mktemp("limited"), size_of(large)
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, large, out, str(size // 2)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems set no such limits")
@pytest.mark.parametrize("limit", LIMITS)
def test_half_of_the_model_fits(large, ended, limit):
    out, how = ended[0] / limit, {name: ended[1][f"{limit}, {name}"] for name in WAYS}
    assert how["streamed"] == 0, (out / "streamed.txt").read_text()
    assert how["in memory"] != 0
    assert "memory" in (out / "in memory.txt").read_text().lower()
    assert bh.summary(bh.stream(out / "streamed")).zeros > 0.4 * size_of(large) / 2
    assert not (out / "in memory").exists()


def test_activations_fit_beside_three_blocks(tmp_path, monkeypatch):
    streamed, dense = store_of(bh.stream("tiny")), bh.load("tiny")
    block = sum(parameter.nbytes for parameter in dense.model.layers[0].parameters())
    size = memory.StreamedSize(4, 4 * block, block, sum(parameter.nbytes for parameter in dense.parameters()) - 4 * block)
    assert memory.streamed_size(streamed) == size
    assert memory.streamed_size(store_of(torch.nn.Linear(2, 2))) == memory.StreamedSize(0, 0, 0, 24)
    words = "2 blocks of up to 20.0 MB, loaded one at a time (30.0 MB in total); 0.5 MB stay in memory"
    assert memory.StreamedSize(2, 30_000_000, 20_000_000, 500_000).text() == words
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    for used in (0, 5120):
        assert memory.resident() == (used or None)
        needed = used + 2**27 + 3 * block + 5
        fits = [memory.fits(streamed, 5, *given) for given in ((0, needed), (7, needed + 7), (8, needed + 7))]
        assert fits == [True, True, False]
        with pytest.raises(ValueError, match="memory=0.13 GiB is too small: .* at least 0.13 GiB. Raise memory"):
            memory.fits(streamed, 5, 0, needed - 1)
        (tmp_path / "status").write_text("VmHWM:\t  7 kB\nVmRSS:\t  5 kB\n")
