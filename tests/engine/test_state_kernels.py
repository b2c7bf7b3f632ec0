"""Hub kernels, which transformers 5.25 and newer puts in place of forwards."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

import billhook as bh
from billhook.engine import evaluating
from billhook.model.meta import to_meta
from kit.families import llama, tokens

kernels = pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif(not hasattr(PreTrainedModel, "reset_kernels"), reason="transformers before 5.25")


class Norm(nn.Module):
    """A kernel that doubles norms and has no gradients, so that each use shows."""

    has_backward = False

    def forward(self, hidden_states):
        return 2 * hidden_states.detach()


class Repository:
    """A repository of one kernel, without the Hub."""

    def load(self):
        return Norm


@pytest.fixture
def kernelized(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    options = {kernels.Mode.INFERENCE: Repository()}
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": options}}):
        yield LlamaForCausalLM.from_pretrained(tmp_path / "dense")


def with_kernel(model):
    return "forward" in vars(model.model.norm)


def test_evaluation_uses_torch_and_brings_kernels_back(kernelized):
    assert with_kernel(kernelized)
    with evaluating(kernelized):
        assert not with_kernel(kernelized)
        assert not kernelized.training
    assert with_kernel(kernelized)


def test_training_goes_on_with_the_kernels_of_training(kernelized):
    kernelized.train()
    assert not with_kernel(kernelized)  # this kernel has no gradients
    with evaluating(kernelized):
        pass
    assert kernelized.training
    assert not with_kernel(kernelized)
    assert kernelized.kernels_mode == kernels.Mode.TRAINING


def test_a_copy_on_meta_has_no_kernels(kernelized):
    copied = to_meta(kernelized)
    assert not with_kernel(copied)
    assert copied.train().training
    assert with_kernel(kernelized)


def test_a_model_with_kernels_is_pruned_as_without(kernelized, tmp_path):
    batches = [{"input_ids": tokens()}]
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "dense", use_kernels=False)
    for model in (kernelized, plain):
        bh.prune(model, bh.Wanda(), batches, sparsity=0.5)
    assert with_kernel(kernelized)
    assert all(map(torch.equal, kernelized.parameters(), plain.parameters()))
