import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
from transformers import CLIPModel

import billhook as bh
from billhook.model.layers import prunable

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch, capsys):
    trainer, data = pl.Trainer, partial(bh.TextDataModule, length=32, batch_size=2)
    monkeypatch.setattr(pl, "Trainer", lambda **options: trainer(**options | {"limit_val_batches": 1}))
    monkeypatch.setattr(bh, "TextDataModule", data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--steps", "10"])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    told = capsys.readouterr().out
    for row in ("dense", "after 8 -> 4 KV heads (mean)", "after 4 -> 2 KV heads (mean)", "after 2 -> 1 KV heads (mean)"):
        assert row in told
    assert "MACBETH." in told


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
@pytest.mark.slow
def test_cross_attention(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cross_attention.py", "--steps", "3"])
    runpy.run_path(str(ROOT / "examples" / "cross_attention.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert all(kind in told for kind in ("encoder, self", "decoder, self", "decoder, cross"))


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.slow
def test_convnext(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convnext.py", "--steps", "4", "--folder", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "convnext.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "channels in 4 modules; OutputNorm, repaired" in told
    assert told.split()[-1] in ("circle", "square", "triangle")
    small = bh.load(str(tmp_path / "model"))
    assert bh.summary(small).flops <= bh.summary(type(small)(small.config)).flops / 2


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.slow
def test_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clip.py", "--steps", "4", "--folder", str(tmp_path)])
    captions = runpy.run_path(str(ROOT / "examples" / "clip.py"), run_name="__main__")["CAPTIONS"]
    assert capsys.readouterr().out.splitlines()[-1] in captions
    small = CLIPModel.from_pretrained(tmp_path / "model")
    assert [one.intermediate_size for one in (small.config.text_config, small.config.vision_config)] == [64, 64]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
@pytest.mark.slow
def test_whisper(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["whisper.py", "--steps", "4", "--folder", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "whisper.py"), run_name="__main__")
    assert "word error rate: " in capsys.readouterr().out
    small = bh.load(str(tmp_path / "model"))
    assert sum(one.count() for one in bh.find_units(small, "head").values()) == 12
    assert {float((linear.weight == 0).float().mean()) for linear in prunable(small).values()} == {0.5}


def run(script, folder, *words):
    """What a script prints in a process of its own: other libraries warn there."""
    command = [sys.executable, ROOT / "examples" / script, *words, "--folder", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_transformers_trainer(tmp_path):
    told = run("transformers_trainer.py", tmp_path, "--steps", "5")
    for row in ("dense", "after structure, -11%", "after 8 -> 2 KV heads (svd)", "end of training", "verified"):
        assert row in told
    assert bh.load(tmp_path / "model").config.num_key_value_heads == 2


@pytest.mark.nightly
@pytest.mark.slow
def test_trl_sft(tmp_path):
    run("trl_sft.py", tmp_path, "--steps", "2")
    sparse = prunable(bh.load(tmp_path / "model")).values()
    assert {round(float((linear.weight == 0).float().mean()), 2) for linear in sparse} == {0.5}


@pytest.mark.nightly
@pytest.mark.slow
def test_trl_distillation(tmp_path):
    run("trl_distillation.py", tmp_path, "--steps", "2")
    config = bh.load(tmp_path / "model").config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 256)


@pytest.mark.nightly
@pytest.mark.slow
def test_accelerate_loop(tmp_path):
    told = run("accelerate_loop.py", tmp_path)
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("step")] == [f"step {step}" for step in range(10)]
    model = bh.load(tmp_path / "model")
    assert model.config.num_key_value_heads == 2
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
