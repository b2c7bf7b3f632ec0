"""What is compared is computed in full precision, whatever a script has set, and that stays set."""

import contextlib

import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from billhook.engine.state import full_precision
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
    plan = bh.plan(
        model, bh.importance.Ablation() if amount.blocks else bh.importance.WeightNorm(), [{"input_ids": tokens()}], amount=amount
    )
    precisions.clear()
    bh.apply(model, plan)
    assert set(precisions) == {"highest"}


def test_what_is_saved(precisions, tmp_path):
    bh.save(llama(), tmp_path / "out")
    assert set(precisions) == {"highest"}


def legacy(value):
    torch.set_float32_matmul_precision(value)


def settings():
    """What torch says; its old setting only where the new ones do not contradict it."""
    backends = torch.backends
    new = [
        one.fp32_precision for one in (backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.mkldnn.matmul)
    ]
    with contextlib.suppress(RuntimeError):
        new.append(torch.get_float32_matmul_precision())
    return new


ORDERS = {
    "the old one": [lambda: legacy("medium")],
    "a new one": [lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")],
    "old, then new": [lambda: legacy("high"), lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")],
    "new, then old": [lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), lambda: legacy("high")],
    "mkldnn": [lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")],
    "all backends": [lambda: setattr(torch.backends, "fp32_precision", "tf32")],
}


@pytest.fixture
def as_before():
    yield
    torch.backends.fp32_precision = "none"
    legacy("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("order", ORDERS)
def test_both_of_torchs_settings_are_full_within_and_as_they_were_afterwards(order, as_before):
    for change in ORDERS[order]:
        change()
    before = settings()
    with full_precision():
        assert settings()[3:] == ["ieee", "ieee", "highest"]
    assert settings() == before
    legacy("high")  # an old setting that was hidden by new ones has come back, too
    for change in ORDERS[order]:
        change()
    hidden = settings()
    bh.prune(torch.nn.Sequential(torch.nn.Linear(4, 4)), bh.Wanda(), [torch.randn(3, 4)], sparsity=0.5)
    assert settings() == hidden
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert torch.get_float32_matmul_precision() == ("medium" if order == "the old one" else "high")


def test_a_setting_that_follows_that_of_all_backends_still_does(as_before):
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert settings()[3:] == ["ieee", "ieee", "highest"]
