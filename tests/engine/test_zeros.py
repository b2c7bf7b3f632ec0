"""Zeros are counted once in each parameter, in memory and in files."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine import zeros
from billhook.engine.zeros import zeros_by_name
from kit.streams import written


@pytest.mark.parametrize("kind", [transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel])
def test_a_streamed_model_has_the_same_zeros(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(zeros, "ELEMENTS", 64)
    dense = bh.load(written(kind, tmp_path / "dense"))
    with torch.no_grad():
        for number, parameter in enumerate(dense.parameters()):
            parameter.add_(1)
            parameter.view(-1)[: number + 1] = 0
    dense.save_pretrained(tmp_path / "zeros")
    expected = {name: number + 1 for number, (name, _) in enumerate(dense.named_parameters())}
    assert zeros_by_name(dense) == zeros_by_name(bh.stream(tmp_path / "zeros")) == expected
