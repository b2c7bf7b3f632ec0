"""A process that may not take as much memory as a model has bytes prunes it where it is streamed, and only there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from kit.limited import LIMITS

SCRIPT = Path(__file__).parents[1] / "kit" / "limited.py"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 227 MB in sixteen blocks of 14 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12, "vocab_size": 512}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems set no such limits")
@pytest.mark.parametrize("limit", LIMITS)
def test_half_of_the_model_fits(large, tmp_path, limit):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    done = {}
    for how in ("streamed", "in memory"):
        command = [sys.executable, SCRIPT, large, tmp_path / how, limit, str(size // 2), how]
        env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done[how] = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done["streamed"].returncode == 0, done["streamed"].stderr
    assert done["in memory"].returncode != 0
    assert "memory" in done["in memory"].stderr.lower()
    assert bh.summary(bh.stream(tmp_path / "streamed")).zeros > 0.4 * size / 2
    assert not (tmp_path / "in memory").exists()
