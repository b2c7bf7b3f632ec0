"""Without any extra, each command is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from billhook.cli.options import COMMANDS, LIGHTNING

HELPS = Path(__file__).parents[2] / ".ci" / "helps.py"
EXTRAS = ["gguf", "onnx", "onnxscript", "onnxruntime", "lm_eval", "sentencepiece", "torch_pruning"]


@pytest.mark.nightly
@pytest.mark.slow
def test_each_command_has_its_help_without_extras():
    done = subprocess.run([sys.executable, HELPS, *EXTRAS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [*LIGHTNING, *COMMANDS]
