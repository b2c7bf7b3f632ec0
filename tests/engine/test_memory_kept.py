"""A refit of wide feed-forwards takes no more memory, beside pages of files, than it says that it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from billhook.assets import model_path, text_files

SCRIPT = Path(__file__).parents[1] / "kit" / "wide.py"


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what a process takes")
def test_what_is_said_to_be_needed_is_enough(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 6144, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2048}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(model_path("tiny")).save_pretrained(tmp_path / "wide")
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, tmp_path / "wide", tmp_path / "out", text_files()["train"]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["memory"]
    assert found["peak"] > found["before"] + 0.1 * 2**30  # or it would tell nothing
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == 4608
