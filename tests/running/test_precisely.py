"""What is compared is computed in full precision, whatever a script has set, and that stays set."""

import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from kit.families import llama, tokens


@pytest.fixture
def precisions(monkeypatch):
    """The precisions of float32 products in which models ran, in a script that has set another one."""
    seen, forward = [], nn.Module.__call__

    def run(module, *given, **named):
        if isinstance(module, transformers.PreTrainedModel) and module.device.type != "meta":
            seen.append(torch.get_float32_matmul_precision())
        return forward(module, *given, **named)

    monkeypatch.setattr(nn.Module, "__call__", run)
    torch.set_float32_matmul_precision("medium")
    yield seen
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "amount",
    [bh.Amount(channels=0.25), bh.Amount(kv_heads=0.5), bh.Amount(residual=0.25), bh.Amount(blocks=1)],
    ids=["channels", "kv_heads", "residual", "blocks"],
)
def test_what_is_removed(amount, precisions):
    model = llama()
    plan = bh.plan(model, bh.Ablation() if amount.blocks else bh.WeightNorm(), [{"input_ids": tokens()}], amount=amount)
    precisions.clear()
    bh.apply(model, plan)
    assert set(precisions) == {"highest"}


def test_kv_heads_that_no_config_says(precisions):
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
        )
    )
    bh.convert_kv_heads(model, 2)
    assert set(precisions) == {"highest"}


def test_what_is_saved(precisions, tmp_path):
    bh.save(llama(), tmp_path / "out")
    assert set(precisions) == {"highest"}
