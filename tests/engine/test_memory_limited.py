"""A process that may not take as much memory as a model has bytes prunes it where it is streamed, and only there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
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
